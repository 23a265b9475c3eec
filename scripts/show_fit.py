"""`calm fit` held against three tasks: what it chose, its seconds, its risk
beside the promise.

    python scripts/show_fit.py --data=DATA --work=runs/fit --output=frozen.json
        \\ --models packed plain=runs/plain_packed/model --ways frozen stored

`frozen` learns exits beside the model's weights, `stored` takes the exits that
it has (`--stages=none`), `train_all` trains all weights within `--budget`.
'packed' is the model in the box saved as a Hugging Face folder, NAME=FOLDER any
other model. Rows are drawn from the test split, for `train_all` from the
training split. Every fit is put into the table when it is made; stopped, the
same command goes on.
"""

import argparse
import json
import pathlib
import platform
import random
import shutil
import time
from typing import Any

import numpy as np
import tables
from rich import console as rich_console

from calm import checkpoints, exits, fitting, inference, storage
from calm.calibrate import Prompt, calibrate, generations, metrics
from calm.calibrate import losses as sequence_losses
from calm.checkpoints import huggingface
from calm.commands import run as run_lib
from calm.data import prompt_files
from calm.fitting import choose
from calm.inference import grid, outputs
from calm.t5 import network

TOLERANCE = 0.1
METRICS = {
  "debian_synopsis": "rouge_l",
  "debian_enfr": "chrf",
  "debian_qa": "token_f1",
}
COLUMNS = (
  "model",
  "task",
  "exits",
  "chosen",
  "layers",
  "cut",
  "ms full",
  "ms served",
)
COLUMNS += ("speed-up", "with encoder", "in batches", "risk, 0.1 promised")
COLUMNS += (
  "layers at 0.05, 0.2",
  "quality full",
  "quality served",
  "full texts equal",
)
COLUMNS += ("exact", "s learning")
WAYS: dict[str, dict[str, Any]] = {
  "frozen": {},
  "stored": {"stages": "none"},
  "train_all": {"train_all": True},
}


def save_packed(arguments: argparse.Namespace) -> pathlib.Path:
  """The packed weights as a Hugging Face folder; the exit classifier has no
  place there.
  """
  packed = checkpoints.load(checkpoints.PACKED)
  return save(arguments.work / "packed_hf", packed.params, packed.config)


def save(
  folder: pathlib.Path, params, config: network.T5Config
) -> pathlib.Path:
  """A Hugging Face folder with the packed model's vocabulary."""
  if not (folder / "config.json").exists():
    huggingface.write(folder, params, config)
    shutil.copy(
      checkpoints.PACKED / "vocabulary.model", folder / "spiece.model"
    )
    stored = json.loads(
      (checkpoints.PACKED / "vocabulary.json").read_text("utf-8")
    )
    options = {
      "tokenizer_class": "T5Tokenizer",
      "extra_ids": stored["extra_ids"],
    }
    storage.write_atomically(
      folder / "tokenizer_config.json", json.dumps(options)
    )
  return folder


def draw(data: pathlib.Path, task: str, split: str, count: int) -> list[Prompt]:
  """Rows of a task, drawn by a fixed seed."""
  examples = prompt_files.open_prompts(
    prompt_files.DEBIAN[task].path(data, split)
  )
  return random.Random(0).sample(examples, min(count, len(examples)))


def fit(
  model: str,
  folder: pathlib.Path,
  task: str,
  way: str,
  arguments: argparse.Namespace,
) -> dict:
  """One fit, and its row of the table."""
  output = arguments.work / f"{model}-{task}-{way}"
  options = dict(WAYS[way])
  if way == "train_all":
    rows = draw(arguments.data, task, "train", 4 * arguments.rows)
    options["budget"] = fitting.parse_budget(arguments.budget)
  else:
    rows = draw(arguments.data, task, "test", arguments.rows)
  start = time.monotonic()
  fitting.fit(
    folder,
    rows,
    output=output,
    tolerance=TOLERANCE,
    metric=METRICS[task],
    prefix=prompt_files.DEBIAN[task].prefix,
    console=rich_console.Console(highlight=False),
    **options,
  )
  print(f"{model}, {task}, {way}: {time.monotonic() - start:.0f} s", flush=True)
  result = json.loads((output / "fit" / "result.json").read_text("utf-8"))
  last = prompt_files.open_prompts(output / "splits" / "last.jsonl")
  prompts = [Prompt(e.id, e.input) for e in last]
  return {
    **row(model, task, way, result),
    "cut": cut(output, prompts, task),
    "layers at 0.05, 0.2": certified_layers(output, task),
    "full texts equal": equal_texts(folder, output, prompts),
  }


def equal_texts(
  folder: pathlib.Path, output: pathlib.Path, prompts: list[Prompt]
) -> str:
  """How many of the prompts' full-depth texts are, token by token, those of the
  given model.
  """
  served = inference.load(output, void_guarantee=True)
  limits = ("task_prefix", "max_input_length", "max_decode_length")
  same = {name: getattr(served.options, name) for name in limits}
  given = inference.load(folder, void_guarantee=True, **same)
  texts = [
    [
      record.tokens
      for record in grid.with_rule(model, prompts, exits.StaticExit())
    ]
    for model in (given, served.reference)
  ]
  return f"{sum(a == b for a, b in zip(*texts, strict=True))} of {len(prompts)}"


def cut(output: pathlib.Path, prompts: list[Prompt], task: str) -> str:
  """The shortest decoder, with its translator, whose mean distance to full
  depth's texts is within the tolerance, and that distance.
  """
  model = inference.load(output, void_guarantee=True)
  metric = metrics.get_metric(METRICS[task])
  full = grid.with_rule(model.reference, prompts, exits.StaticExit())
  for layer in range(1, model.num_layers):
    made = grid.with_rule(model, prompts, exits.StaticExit(layer))
    pair = generations.Generations(
      tuple(prompts), np.array([0.5]), (made,), full
    )
    distance = sequence_losses.prefix_losses(pair, "textual", metric=metric)[
      0
    ].mean()
    if distance <= TOLERANCE:
      return f"after {layer} ({distance:.3f})"
  return "none"


def certified_layers(output: pathlib.Path, task: str) -> str:
  """Mean layers of the lowest threshold certified at tolerances 0.05 and 0.2,
  of the same generations; full depth where nothing is.
  """
  folder = output / "fit" / "calibration"
  if not folder.is_dir():
    return ""
  cached = generations.load(folder)
  losses = sequence_losses.compute(cached, "textual", metric=METRICS[task])
  found = []
  for tolerance in (0.05, 0.2):
    made = calibrate(losses, tolerance=tolerance, error_rate=0.05)
    certified = [
      i for i, t in enumerate(cached.thresholds) if t == made.threshold
    ]
    depth = (
      outputs.mean_layers(cached.records[certified[0]]) if certified else None
    )
    found.append("full" if depth is None else f"{depth:.2f}")
  return ", ".join(found)


def row(model: str, task: str, way: str, result: dict) -> dict:
  """A fit's result as the table shows it."""
  choice = result["choice"]
  last = result["last"]
  seconds = result["seconds"]
  tried = (
    None if choice["chosen"] is None else choice["tried"][choice["chosen"]]
  )
  chosen = str(tried and choose.Candidate(**tried["candidate"]))
  single = (seconds or {}).get("single")
  batched = (seconds or {}).get("batched")

  def mean(value):
    return (
      "" if value is None else f"{value['value']:.3f} ± {value['margin']:.3f}"
    )

  def speed(pair, key):
    return None if pair is None else pair[key]

  learned = result.get("learned")
  exact = result["exact"]
  return {
    "model": model,
    "task": task.removeprefix("debian_"),
    "exits": way,
    "chosen": chosen if tried and not result["reason"] else "full depth",
    "layers": f"{last['layers']:.2f} of {result['num_layers']}",
    "ms full": speed(single, "full"),
    "ms served": speed(single, "early"),
    "speed-up": speed(single, "speedup"),
    "with encoder": speed(single, "end_to_end"),
    "in batches": speed(batched, "speedup"),
    "risk, 0.1 promised": mean(last["risk"]),
    "quality full": mean(last["quality_full"]),
    "quality served": mean(last["quality_early"]),
    "exact": speed((exact or {}).get("single"), "speedup"),
    "s learning": learned and round(learned["seconds"]),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--data", type=pathlib.Path, required=True, help="folder of the tasks"
  )
  parser.add_argument(
    "--work", type=pathlib.Path, required=True, help="folder of the fits"
  )
  parser.add_argument("--output", required=True, help="JSON of the table")
  parser.add_argument(
    "--tasks", nargs="+", default=list(METRICS), choices=list(METRICS)
  )
  parser.add_argument(
    "--models", nargs="+", default=["packed"], help="or NAME=FOLDER"
  )
  parser.add_argument(
    "--ways", nargs="+", default=["frozen", "stored"], choices=list(WAYS)
  )
  parser.add_argument(
    "--rows", type=int, default=600, help="rows a fit (default 600)"
  )
  parser.add_argument(
    "--budget", default="3m", help="of `train_all` (default 3m)"
  )
  arguments = parser.parse_args()
  run_lib.use_compilation_cache()
  for model in arguments.models:
    name, _, path = model.partition("=")
    folder = pathlib.Path(path) if path else save_packed(arguments)
    for task in arguments.tasks:
      for way in arguments.ways:
        record(arguments, fit(name, folder, task, way, arguments))


def record(arguments: argparse.Namespace, made: dict) -> None:
  """Puts a row into the table, in the place of an earlier one of the same
  fit.
  """
  path = pathlib.Path(arguments.output)
  rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []

  def key(row):
    return (row["model"], row["task"], row["exits"])

  rows = sorted(
    [row for row in rows if key(row) != key(made)] + [made], key=key
  )
  python = {"python": platform.python_version()}
  machine = "two shared CPU cores"
  packages = ("jax",)
  tables.write(
    path, COLUMNS, rows, machine=machine, packages=packages, versions=python
  )


if __name__ == "__main__":
  main()
