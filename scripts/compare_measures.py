"""Confidence measures side by side: calibrated layers and seconds, and quality
by mean depth.

    python scripts/compare_measures.py --data=data
    --output=scripts/results/measures

Of every task's test prompts, one a source, four in five calibrate (textual,
`auto`, epsilon 0.05) and the others are unseen. Writes
`<output>_calibrated.json`: risk on unseen prompts, layers a token and decoder
speed-up one prompt at a time, by delta. Decoded prompts and seconds are cached
in --cache.
"""

import argparse
import pathlib

import tables

from calm import exits, inference
from calm.paper import bench, experiments

MEASURES = (
  "softmax@2,4",
  "softmax@2,3,4",
  "shortlist@2,4",
  "classifier",
  "probe@2,4",
)
TARGETS = [("textual", delta) for delta in (0.02, 0.1, 0.25)]
METHODS = {"auto": "risk_signed"}


def opened(arguments: argparse.Namespace, name: str) -> experiments.Task:
  """One task's prompts under the model."""
  task = bench.task(name)
  predictor = inference.load(arguments.model, batch_size=32).with_options(
    task_prefix=task.prefix,
    max_input_length=task.max_input_length,
    max_decode_length=task.max_decode_length,
  )
  options = bench.Options(timed=6, measures=tuple(arguments.measures))
  validation, test = (
    bench.read_prompts(arguments.data, task, split, limit=arguments.limit)
    for split in ("validation", "test")
  )
  cache = pathlib.Path(arguments.cache)
  return experiments.Task(predictor, task, validation, test, cache, options)


def titled(measure: str) -> str:
  """The title of 'probe@2,4' for a reader."""
  name, _, layers = measure.partition("@")
  return f"{name} after {layers}" if layers else f"{name}, every layer"


def cell(gain: experiments.Gain) -> str:
  """Risk on unseen prompts, layers and speed-up; the risk in bold where it is
  above delta.
  """
  risk = f"{gain.risk:.3f}"
  risk = f"**{risk}**" if float(risk) > gain.tolerance else risk
  return f"{risk}, {gain.layers:.2f}, x{gain.speedup:.2f}"


def rows(of: experiments.Task) -> list[list[str]]:
  """A row a measure by delta, and the oracle's."""
  title = of.settings.title
  full = of.records("full depth test", exits.StaticExit(), of.test)
  early = of.records("oracle test", exits.OracleExit(), of.test)
  oracle = experiments.point("oracle", early, full, of.test, of.settings.metric)
  gains = experiments.gains(of, targets=TARGETS, methods=METHODS)
  calibrated = [
    [
      title,
      titled(measure),
      *(cell(gain) for gain in gains if gain.measure == measure),
    ]
    for measure in of.measures
  ]
  return [
    *calibrated,
    [title, "oracle", f"{1 - oracle.similarity:.3f}, {oracle.layers:.2f}"],
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", required=True, help="folder of the data sets")
  parser.add_argument("--model", default="packed")
  parser.add_argument("--tasks", nargs="+", default=["synopsis", "qa", "enfr"])
  parser.add_argument("--measures", nargs="+", default=MEASURES)
  parser.add_argument(
    "--limit", type=int, default=120, help="prompts of a task"
  )
  parser.add_argument(
    "--cache", default="runs/measures", help="what is done already"
  )
  parser.add_argument("--output", help="begin of the name of the JSON file")
  arguments = parser.parse_args()
  lines = []
  for name in arguments.tasks:
    lines += rows(opened(arguments, name))
    for line in lines[-len(arguments.measures) - 1 :]:
      print("  ".join(f"{text:<24}" for text in line), flush=True)
  if arguments.output:
    columns = [
      "task",
      "measure",
      *(f"delta = {delta:g}" for _, delta in TARGETS),
    ]
    padded = [[*row, *[""] * (len(columns) - len(row))] for row in lines]
    align = ["left", "left", *["right"] * len(TARGETS)]
    about = {
      "align": align,
      "machine": "two shared CPU cores",
      "packages": ["jax"],
    }
    tables.write(
      f"{arguments.output}_calibrated.json", columns, padded, **about
    )


if __name__ == "__main__":
  main()
