"""`calm fit` held against three tasks: what it chose, its seconds, its risk beside the promise.

    python scripts/show_fit.py --data=DATA --work=runs/fit --output=scripts/results/fit.json

The packed weights are saved as a Hugging Face folder and fitted to each task with trained exits
(`--stages=none`), as somebody would who has such a folder; random weights of another size are
trained and fitted within `--budget`. With `--transformers=PYTHON`, an interpreter that has
transformers and torch, the packed weights are saved by transformers and fitted once more
(`--weights=transformers`). Rows are drawn from the test split, which the packed weights have
not seen; random weights train on rows of the training split. Every fit is put into the table
when it is made; stopped, the same command goes on.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import random
import shutil
import subprocess
import time

import jax
import numpy as np

import calm
from calm import checkpoints, fitting, training
from calm.calibrate import Prompt
from calm.calibrate.generations import files
from calm.checkpoints import huggingface
from calm.commands import common
from calm.data import datasets
from calm.t5 import network

METRICS = {"debian_synopsis": "rouge_l", "debian_enfr": "chrf", "debian_qa": "token_f1"}
COLUMNS = (
  "weights",
  "task",
  "chosen",
  "layers",
  "ms full",
  "ms served",
  "speed-up",
  "with encoder",
  "in batches",
  "risk, 0.1 promised",
  "quality full",
  "quality served",
)
SAVE_WITH_TRANSFORMERS = """
import sys, transformers
model = transformers.T5ForConditionalGeneration.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


def save_packed(arguments: argparse.Namespace) -> pathlib.Path:
  """The packed weights as a Hugging Face folder; the exit classifier has no place there."""
  packed = checkpoints.load(checkpoints.PACKED)
  return save(arguments.work / "packed_hf", packed.params, packed.config)


def save_random(arguments: argparse.Namespace) -> pathlib.Path:
  """Random weights of another size than the packed ones."""
  packed = checkpoints.load(checkpoints.PACKED).config
  config = dataclasses.replace(
    packed, emb_dim=96, num_encoder_layers=2, num_decoder_layers=6, mlp_dim=256, num_heads=3,
    exit_classifier=False,
  )  # fmt: skip
  params = jax.tree.map(np.asarray, training.init_params(config, seed=0))
  return save(arguments.work / "random_hf", params, config)


def save_with_transformers(arguments: argparse.Namespace) -> pathlib.Path:
  """The packed weights, opened and saved by transformers."""
  if not arguments.transformers:
    raise SystemExit("Expected `--transformers` for --weights=transformers, got none.")
  folder = arguments.work / "saved_by_transformers"
  if not folder.exists():
    source = save_packed(arguments)
    command = [arguments.transformers, "-c", SAVE_WITH_TRANSFORMERS, str(source), str(folder)]
    subprocess.run(command, check=True)
  return folder


WEIGHTS = {
  "packed": save_packed,
  "transformers": save_with_transformers,
  "random": save_random,
}


def save(folder: pathlib.Path, params, config: network.T5Config) -> pathlib.Path:
  """A Hugging Face folder with the packed model's vocabulary."""
  if not (folder / "config.json").exists():
    huggingface.write(folder, params, config)
    shutil.copy(checkpoints.PACKED / "vocabulary.model", folder / "spiece.model")
    stored = json.loads((checkpoints.PACKED / "vocabulary.json").read_text("utf-8"))
    options = {"tokenizer_class": "T5Tokenizer", "extra_ids": stored["extra_ids"]}
    files.write_atomically(folder / "tokenizer_config.json", json.dumps(options))
  return folder


def draw(data: pathlib.Path, task: str, split: str, count: int) -> list[Prompt]:
  """Rows of a task, drawn by a fixed seed."""
  examples = datasets.read_examples(datasets.DEBIAN[task].path(data, split))
  chosen = random.Random(0).sample(examples, min(count, len(examples)))
  return [Prompt(e.id, e.input, e.targets, e.source) for e in chosen]


def fit(name: str, folder: pathlib.Path, task: str, arguments: argparse.Namespace) -> dict:
  """One fit, and its row of the table."""
  output = arguments.work / f"{name}-{task}"
  if name == "random":
    rows = draw(arguments.data, task, "train", 4 * arguments.rows)
    options = {"budget": fitting.parse_budget(arguments.budget)}
  else:
    rows = draw(arguments.data, task, "test", arguments.rows)
    options = {"stages": "none"}
  start = time.monotonic()
  fitting.fit(
    folder,
    rows,
    output=output,
    tolerance=0.1,
    metric=METRICS[task],
    prefix=datasets.DEBIAN[task].prefix,
    listener=fitting.Listener(say=lambda text: print(text, flush=True)),
    **options,
  )
  print(f"{name}, {task}: {time.monotonic() - start:.0f} s", flush=True)
  return row(name, task, json.loads((output / "fit" / "result.json").read_text("utf-8")))


def row(name: str, task: str, result: dict) -> dict:
  """A fit's result as the table shows it."""
  choice, last, seconds = result["choice"], result["last"], result["seconds"]
  candidate = (
    None if choice["chosen"] is None else choice["tried"][choice["chosen"]]["candidate"]
  )
  single, batched = (seconds or {}).get("single"), (seconds or {}).get("batched")
  mean = lambda value: "" if value is None else f"{value['value']:.3f} ± {value['margin']:.3f}"
  speed = lambda pair, key: None if pair is None else pair[key]
  return {
    "weights": name,
    "task": task.removeprefix("debian_"),
    "chosen": described(candidate) if candidate and not result["reason"] else "full depth",
    "layers": f"{last['layers']:.2f} of {result['num_layers']}",
    "ms full": speed(single, "full"),
    "ms served": speed(single, "early"),
    "speed-up": speed(single, "speedup"),
    "with encoder": speed(single, "end_to_end"),
    "in batches": speed(batched, "speedup"),
    "risk, 0.1 promised": mean(last["risk"]),
    "quality full": mean(last["quality_full"]),
    "quality served": mean(last["quality_early"]),
  }


def described(candidate: dict) -> str:
  """A way to leave in a few words."""
  layers = ",".join(map(str, candidate["exit_layers"]))
  decays = "" if candidate["temperature"] is None else f", tau {candidate['temperature']:g}"
  return f"{candidate['measure']} after {layers}{decays}"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the tasks")
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of the fits")
  parser.add_argument("--output", required=True, help="JSON of the table")
  parser.add_argument("--tasks", nargs="+", default=list(METRICS), choices=list(METRICS))
  parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
  parser.add_argument("--rows", type=int, default=600, help="rows a fit (default 600)")
  parser.add_argument("--budget", default="3m", help="training of random weights (default 3m)")
  parser.add_argument("--transformers", metavar="PYTHON", help="has transformers and torch")
  arguments = parser.parse_args()
  common.use_compilation_cache()
  for name in arguments.weights:
    folder = WEIGHTS[name](arguments)
    for task in arguments.tasks:
      record(arguments, fit(name, folder, task, arguments))


def record(arguments: argparse.Namespace, made: dict) -> None:
  """Puts a row into the table, in the place of an earlier one of the same fit."""
  path = pathlib.Path(arguments.output)
  rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
  same = lambda row: (row["weights"], row["task"]) == (made["weights"], made["task"])
  rows = [row for row in rows if not same(row)] + [made]
  order = [*WEIGHTS]
  rows.sort(key=lambda row: order.index(row["weights"]))
  table = {
    "command": "python scripts/show_fit.py --data=data --work=runs/fit --output=fit.json"
    f" --rows={arguments.rows} --budget={arguments.budget} --transformers=PYTHON",
    "machine": "two shared CPU cores",
    "columns": COLUMNS,
    "rows": rows,
    "versions": {
      "calm": calm.__version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
  }
  text = json.dumps(table, indent=1, ensure_ascii=False)
  files.write_atomically(path, text + "\n")


if __name__ == "__main__":
  main()
