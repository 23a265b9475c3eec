"""Confidence measures side by side, teacher-forced: layers a token at a share of other words.

    python scripts/rank_measures.py --data=data --output=scripts/results/rank_measures.json
    python scripts/rank_measures.py --data=data --models before=runs/one/model after=packed

Every layer is read at every token of the full model's own texts for validation prompts, one a
source (`calm.fitting.candidates`). A cell is the least mean number of decoder layers at which
at most that share of the tokens would be another word, over thresholds, were states not
propagated: what a measure's order of tokens is worth, before any decoding. The oracle leaves at
the first layer that has the last one's word.
"""

import argparse
import itertools

import numpy as np
import tables

from calm import exits, inference
from calm.fitting import candidates
from calm.inference import grid
from calm.paper import tasks

SHARES = (0.02, 0.04, 0.06, 0.1)
TITLES = {"synopsis": "synopses", "qa": "questions", "enfr": "translations"}
# Beside every layer: where the full head is asked seldom.
LAYERS = (None, (2, 3, 4))


def read(arguments, folder: str, task: str) -> candidates.Reading:
  """Every measure at every layer and token."""
  settings = tasks.task(task)
  model = inference.load(folder, batch_size=arguments.batch_size).with_options(
    task_prefix=settings.prefix,
    max_input_length=settings.max_input_length,
    max_decode_length=settings.max_decode_length,
  )
  prompts = tasks.read_prompts(arguments.data, settings, "validation", limit=arguments.limit)
  full = grid.with_rule(grid.one_shape(model), prompts, exits.StaticExit())
  silent = lambda share, text: None
  texts = [prompt.input for prompt in prompts]
  return candidates.read_layers(model, texts, full, arguments.measures, silent)


def layers_at(found: candidates.Reading, measure: str, allowed: tuple[int, ...]) -> list[float]:
  """Mean layers at every share of `SHARES`."""
  candidate = candidates.Candidate(measure, allowed)
  levels = np.unique(np.quantile(found.confidences[measure], np.linspace(0, 1, 400)))[::-1]
  depth, _ = candidates.simulate(found, candidate, levels, 1)
  wrong = ~np.take_along_axis(found.agrees, depth.T - 1, axis=1)
  shares, mean = wrong.mean(axis=0), depth.mean(axis=1)
  return [float(min(mean[shares <= most], default=found.num_layers)) for most in SHARES]


def rows(model: str, task: str, found: candidates.Reading) -> list[list]:
  """One line a measure and set of layers; the oracle's last."""
  last = found.num_layers
  made = []
  for measure in found.confidences:
    for layers in LAYERS:
      cells = layers_at(found, measure, layers or tuple(range(1, last)))
      where = "every layer" if layers is None else f"after {', '.join(map(str, layers))}"
      made.append([model, TITLES[task], f"{measure}, {where}", *cells])
  oracle = float((np.argmax(found.agrees, axis=1) + 1).mean())
  return [*made, [model, TITLES[task], "oracle", *[oracle] * len(SHARES)]]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", required=True, help="folder of the data sets")
  parser.add_argument(
    "--models", nargs="+", default=["packed"], help="checkpoints, each as FOLDER or NAME=FOLDER"
  )
  parser.add_argument("--tasks", nargs="+", default=list(TITLES), choices=list(TITLES))
  parser.add_argument(
    "--measures",
    nargs="+",
    default=["softmax", "state", "classifier", "probe"],
  )
  parser.add_argument("--limit", type=int, default=300, help="prompts of a task")
  parser.add_argument("--batch_size", type=int, default=50)
  parser.add_argument("--output", help="JSON file of the table")
  arguments = parser.parse_args()
  lines = []
  named = [model.rpartition("=") for model in arguments.models]
  for (name, _, folder), task in itertools.product(named, arguments.tasks):
    lines += rows(name or folder, task, read(arguments, folder, task))
    for line in lines[-len(arguments.measures) * len(LAYERS) - 1 :]:
      print("  ".join(f"{x:<24}" if isinstance(x, str) else f"{x:.2f}" for x in line))
  if arguments.output:
    shown = [f"{100 * share:g} % other words" for share in SHARES]
    columns = ["model", "task", "measure", *shown]
    tables.write(arguments.output, columns, lines, packages=("jax", "numpy"))


if __name__ == "__main__":
  main()
