"""Confidence measures side by side: calibrated layers and seconds, and quality by mean depth.

    python scripts/compare_measures.py --data=data --output=scripts/results/measures

Of every task's test prompts, one a source, four in five calibrate (textual, `auto`, epsilon
0.05) and the others are unseen. Writes `<output>_calibrated.json` (risk on unseen prompts,
layers a token and decoder speed-up one prompt at a time, by delta) and `<output>_by_depth.json`
(quality against references at the same mean depth, interpolated along a measure's grid).
Decoded prompts and seconds are cached in --cache.
"""

import argparse
import pathlib

import numpy as np
import tables

from calm import exits, inference
from calm.paper import bench, experiments, scores, tasks

MEASURES = ("softmax@2,4", "softmax@2,3,4", "shortlist@2,4", "classifier", "probe@2,4")
TARGETS = [experiments.Target("textual", delta) for delta in (0.02, 0.1, 0.25)]
DEPTHS = (2.0, 2.5, 3.0, 4.0, 6.0)
METHOD = experiments.Method("auto", "risk_signed")


def opened(arguments: argparse.Namespace, name: str) -> bench.Bench:
  """One task's prompts under the model."""
  task = tasks.task(name)
  predictor = inference.load(arguments.model, batch_size=arguments.batch_size).with_options(
    task_prefix=task.prefix,
    max_input_length=task.max_input_length,
    max_decode_length=task.max_decode_length,
  )
  options = bench.Options(
    limit=arguments.limit,
    timed=arguments.timed,
    measures=tuple(arguments.measures),
    seed=arguments.seed,
  )
  data, cache = pathlib.Path(arguments.data), pathlib.Path(arguments.cache)
  return bench.Bench(predictor, task, data, cache, options)


def titled(measure: str) -> str:
  """The title of 'probe@2,4/8' for a reader."""
  measure, _, decay = measure.partition("/")
  name, _, layers = measure.partition("@")
  title = f"{name} after {layers}" if layers else f"{name}, every layer"
  return f"{title}; decaying, {decay}" if decay else title


def cell(gain: experiments.Gain, tolerance: float) -> str:
  """Risk on unseen prompts, layers and speed-up; the risk in bold where it is above delta."""
  risk = f"{gain.risk:.3f}"
  risk = f"**{risk}**" if float(risk) > tolerance else risk
  return f"{risk}, {gain.layers:.2f}, x{gain.speedup:.2f}"


def rows(of: bench.Bench) -> tuple[list[list[str]], list[list[str]]]:
  """(a row a measure by delta, a row a measure by depth)."""
  depths, title = range(1, of.num_layers + 1), of.settings.title
  static = [of.records(f"static {k} test", exits.StaticExit(k), of.test) for k in depths]
  scorer = scores.Scorer([prompt.targets for prompt in of.test], of.settings.metric)
  scored = lambda records: scorer.scores(records, static[-1])
  oracle = scored(of.records("oracle test", exits.OracleExit(), of.test))
  table = experiments.gains(of, targets=TARGETS, methods=[METHOD])
  cells = {(row.target, row.measure): row.gains[0] for row in table.rows}
  calibrated = [
    [title, titled(m), *(cell(cells[target, m], target.tolerance) for target in TARGETS)]
    for m in of.measures
  ]
  calibrated.append([title, "oracle", f"{1 - oracle.similarity:.3f}, {oracle.layers:.2f}"])
  curves = {titled(m): list(map(scored, of.test_grids[m].records)) for m in of.measures}
  curves["static"] = list(map(scored, static))
  by_depth = []
  for name, points in curves.items():
    points = sorted(points, key=lambda point: point.layers)
    layers, quality = zip(*((p.layers, 100 * p.quality) for p in points), strict=True)
    values = np.interp(DEPTHS, layers, quality, left=np.nan, right=np.nan)
    by_depth.append([title, name, *("" if np.isnan(v) else f"{v:.1f}" for v in values)])
  return calibrated, by_depth


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", required=True, help="folder of the data sets")
  parser.add_argument("--model", default="packed")
  parser.add_argument("--tasks", nargs="+", default=["synopsis", "qa", "enfr"])
  parser.add_argument("--measures", nargs="+", default=MEASURES)
  parser.add_argument("--limit", type=int, default=120, help="prompts of a task")
  parser.add_argument("--timed", type=int, default=6, help="half of the prompts timed alone")
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--seed", type=int, default=0, help="draws the prompts")
  parser.add_argument("--cache", default="runs/measures", help="what is done already")
  parser.add_argument("--output", help="begin of the names of the two JSON files")
  arguments = parser.parse_args()
  lines, depths = [], []
  for name in arguments.tasks:
    calibrated, by_depth = rows(opened(arguments, name))
    lines += calibrated
    depths += by_depth
    for line in [*calibrated, *by_depth]:
      print("  ".join(f"{text:<24}" for text in line), flush=True)
  if arguments.output:
    for kind, heads, made in (
      ("calibrated", [f"delta = {target.tolerance:g}" for target in TARGETS], lines),
      ("by_depth", [f"{depth:g} layers" for depth in DEPTHS], depths),
    ):
      columns = ["task", "measure", *heads]
      padded = [[*row, *[""] * (len(columns) - len(row))] for row in made]
      align = ["left", "left", *["right"] * len(heads)]
      about = {"align": align, "machine": "two shared CPU cores", "packages": ["jax"]}
      tables.write(f"{arguments.output}_{kind}.json", columns, padded, **about)


if __name__ == "__main__":
  main()
