"""Confidence measures side by side: calibrated layers and seconds, and quality by mean depth.

    python scripts/compare_measures.py --data=data --output=scripts/results/measures

Of every task's test prompts, one a source, four in five calibrate (textual, `auto`, epsilon
0.05) and the others are unseen; who chooses among many settings does so with --part=validation.
Writes `<output>_calibrated.json` (risk on unseen prompts,
layers a token and decoder speed-up one prompt at a time, by delta) and `<output>_by_depth.json`
(quality against references at the same mean depth, interpolated along a measure's grid). What
is decoded and timed is cached in --cache; --no_seconds decodes without timing.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping

import jax
import numpy as np

import calm
from calm import exits, inference, storage
from calm.calibrate import NEVER_EXIT, Prompt, generations
from calm.inference import timing
from calm.paper.bench import bench, scores, tasks
from calm.paper.experiments import gains

MEASURES = (
  *(
    "softmax@2,4",
    "softmax@2,3,4",
    "shortlist@2,4",
  ),
  *("classifier", "probe@2,4", "probe@2,3,4"),
)
DELTAS = (0.02, 0.1, 0.25)
DEPTHS = (2.0, 2.5, 3.0, 4.0, 6.0)
METHOD = gains.Method("auto", "risk_signed")


def opened(arguments, task: str) -> bench.Bench:
  """One task's prompts under the model."""
  settings = tasks.task(task)
  predictor = inference.load(arguments.model, batch_size=arguments.batch_size).with_options(
    task_prefix=settings.prefix,
    max_input_length=settings.max_input_length,
    max_decode_length=settings.max_decode_length,
  )
  options = bench.Options(
    limit=arguments.limit, rounds=3, measures=tuple(arguments.measures), seed=arguments.seed
  )
  return bench.Bench(
    predictor, settings, pathlib.Path(arguments.data), pathlib.Path(arguments.cache), options
  )


@dataclasses.dataclass(frozen=True)
class Part:
  """Prompts of a task, decoded over every measure's grid.

  Attributes:
    name: 'test' or 'validation'.
    task: where they are from.
  """

  name: str
  task: bench.Bench

  @property
  def prompts(self) -> tuple[Prompt, ...]:
    return self.task.test if self.name == "test" else self.task.validation

  @property
  def grids(self) -> Mapping[str, generations.Generations]:
    return self.task.test_grids if self.name == "test" else self.task.validation_grids


def static_and_oracle(part: Part) -> dict:
  """Records of fixed depths and of the oracle."""
  task = part.task
  depths = range(1, task.predictor.num_layers + 1)
  rules = {f"static {k}": exits.StaticExit(k) for k in depths} | {"oracle": exits.OracleExit()}
  named = lambda name: f"{name} {part.name}"
  return {name: task.records(named(name), rule, part.prompts) for name, rule in rules.items()}


def calibrated(part: Part, fixed: dict, timed: int) -> list[list[str]]:
  """A line a measure: risk, layers and speed-up at every delta."""
  task, targets = part.task, [gains.Target("textual", delta) for delta in DELTAS]
  found = gains.gains(
    part.grids,
    task.predictor.num_layers,
    task.settings.metric,
    targets=targets,
    methods=[METHOD],
  )
  if timed:
    wanted = {measure: set() for measure in task.measures}
    for row in found.rows:
      wanted[row.measure] |= {row.gains[0].threshold} - {NEVER_EXIT}
    prompts = timing.of_one_length(
      task.timed_model, part.prompts[found.num_calibration :], timed
    )
    levels = {measure: sorted(levels) for measure, levels in wanted.items()}
    settings = task.timed_settings(levels)
    found = gains.with_times(found, task.time("measures", prompts, settings))
  cells = {(row.target, row.measure): row.gains[0] for row in found.rows}
  lines = [
    [
      task.settings.title,
      titled(measure),
      *(cell(cells[target, measure], target.tolerance) for target in targets),
    ]
    for measure in task.measures
  ]
  full = fixed[f"static {task.predictor.num_layers}"]
  oracle = scored(part, fixed["oracle"], full)
  return [
    *lines,
    [task.settings.title, "oracle", f"{1 - oracle.similarity:.3f}, {oracle.layers:.2f}"],
  ]


def cell(gain: gains.Gain, tolerance: float) -> str:
  """Risk on unseen prompts, layers and speed-up; the risk in bold where it is above delta."""
  risk = f"{gain.risk:.3f}"
  risk = f"**{risk}**" if float(risk) > tolerance else risk
  seconds = "" if np.isnan(gain.speedup) else f", x{gain.speedup:.2f}"
  return f"{risk}, {gain.layers:.2f}{seconds}"


def titled(measure: str) -> str:
  """'probe@2,4/8' as a reader says it."""
  measure, _, decay = measure.partition("/")
  name, _, layers = measure.partition("@")
  title = f"{name} after {layers}" if layers else f"{name}, every layer"
  return f"{title}; decaying, {decay}" if decay else title


def scored(part: Part, records, full) -> scores.Scores:
  references = [prompt.targets for prompt in part.prompts]
  return scores.score(records, references, full, part.task.settings.metric)


def by_depth(part: Part, fixed: dict) -> list[list[str]]:
  """A line a measure: quality at the same mean depths."""
  task = part.task
  full = fixed[f"static {task.predictor.num_layers}"]
  curves = {
    titled(measure): [scored(part, records, full) for records in cached.records]
    for measure, cached in part.grids.items()
  }
  depths = range(1, task.predictor.num_layers + 1)
  curves["static"] = [scored(part, fixed[f"static {k}"], full) for k in depths]
  lines = []
  for name, points in curves.items():
    points = sorted(points, key=lambda point: point.layers)
    layers = [point.layers for point in points]
    quality = [100 * point.quality for point in points]
    values = np.interp(DEPTHS, layers, quality, left=np.nan, right=np.nan)
    cells = ["" if np.isnan(value) else f"{value:.1f}" for value in values]
    lines.append([task.settings.title, name, *cells])
  return lines


def write(path: str, columns, rows, command: str) -> None:
  value = {
    "command": command,
    "columns": columns,
    "align": ["left", "left", *["right"] * (len(columns) - 2)],
    "rows": [[*row, *[""] * (len(columns) - len(row))] for row in rows],
    "machine": "two shared CPU cores",
    "versions": {"calm": calm.__version__, "jax": jax.__version__},
  }
  text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
  storage.write_atomically(pathlib.Path(path), text)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", required=True, help="folder of the data sets")
  parser.add_argument("--model", default="packed")
  parser.add_argument("--tasks", nargs="+", default=["synopsis", "qa", "enfr"])
  parser.add_argument("--measures", nargs="+", default=MEASURES)
  parser.add_argument("--limit", type=int, default=120, help="prompts of a task")
  parser.add_argument("--part", choices=("test", "validation"), default="test")
  parser.add_argument("--timed", type=int, default=12, help="prompts decoded alone")
  parser.add_argument("--no_seconds", action="store_true", help="decode, but time nothing")
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--seed", type=int, default=0, help="draws the prompts")
  parser.add_argument("--cache", default="runs/measures", help="what is done already")
  parser.add_argument("--output", help="begin of the names of the two JSON files")
  arguments = parser.parse_args()
  lines, depths = [], []
  for name in arguments.tasks:
    task = opened(arguments, name)
    part = Part(arguments.part, task)
    fixed = static_and_oracle(part)
    lines += calibrated(part, fixed, 0 if arguments.no_seconds else arguments.timed)
    depths += by_depth(part, fixed)
    for line in [*lines[-len(task.measures) - 1 :], *depths[-len(task.measures) - 1 :]]:
      print("  ".join(f"{cell:<24}" for cell in line), flush=True)
  if arguments.output:
    command = shlex.join(["python", "scripts/compare_measures.py", *sys.argv[1:]])
    task_columns = ["task", "measure"]
    deltas = [f"delta = {delta:g}" for delta in DELTAS]
    write(f"{arguments.output}_calibrated.json", [*task_columns, *deltas], lines, command)
    at = [f"{depth:g} layers" for depth in DEPTHS]
    write(f"{arguments.output}_by_depth.json", [*task_columns, *at], depths, command)


if __name__ == "__main__":
  main()
