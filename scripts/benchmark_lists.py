r"""What long prompt lists cost: a threshold grid with and without reuse, and refilled rows.

  python scripts/benchmark_lists.py --prompts=data/debian_synopsis/validation.jsonl.gz \
      --limit=256 --batch_size=32 --measure=softmax --exit_layers=2,4 --threshold=0.2

Seconds of the encoder and the decoder together, texts made and files written included. Every
repeat runs every row once, so that drift hits all alike; a first round, which compiles, is not
counted. A grid is twenty thresholds and full depth, where no other is given.
"""

import argparse
import json
import pathlib
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import tables

import calm
from calm import exits, inference, storage
from calm.calibrate.generations import writer as writer_lib
from calm.commands import flags as flags_lib
from calm.commands import generate
from calm.inference import grid


def grid_run(model: inference.Predictor, prompts, levels, *, reuse: bool) -> Callable[[], Any]:
  """A run over the whole grid into a folder of its own; returns how much was reused."""

  def run():
    with tempfile.TemporaryDirectory() as folder:
      writer = writer_lib.open_writer(
        pathlib.Path(folder) / "grid",
        prompts=prompts,
        thresholds=levels,
        procedure=model.procedure,
      )
      return grid.generate(model, prompts, levels, writer, reuse_records=reuse)

  return run


def rows(model: inference.Predictor, prompts, levels, threshold: float | None):
  """name -> what is timed."""
  texts = [prompt.input for prompt in prompts]
  refilled = model.with_options(refill=True)
  full = exits.StaticExit()
  made = {
    "full depth": lambda: model.generate(texts, rule=full),
    "full depth, rows refilled": lambda: refilled.generate(texts, rule=full),
    "grid without reuse": grid_run(model, prompts, levels, reuse=False),
    "grid with reuse": grid_run(model, prompts, levels, reuse=True),
  }
  if threshold is not None:
    name = f"threshold {threshold:g}"
    made[name] = lambda: model.generate(texts, threshold=threshold)
    made[f"{name}, rows refilled"] = lambda: refilled.generate(texts, threshold=threshold)
  return made


def measure(made: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
  """Seconds of every repeat; the first round is left out."""
  seconds: dict[str, list[float]] = {name: [] for name in made}
  for repeat in range(repeats + 1):
    for name, run in made.items():
      start = time.perf_counter()
      run()
      spent = time.perf_counter() - start
      print(f"{name}: {spent:.2f} s" + ("" if repeat else ", not counted"), file=sys.stderr)
      if repeat:
        seconds[name].append(spent)
  return seconds


def table(seconds: dict[str, list[float]]) -> list[dict[str, str | float]]:
  """Medians, the range, and each over full depth and over what it replaces."""
  median = {name: statistics.median(values) for name, values in seconds.items()}
  lines = []
  for name, values in seconds.items():
    replaced = name.replace("with reuse", "without reuse").replace(", rows refilled", "")
    lines.append(
      {
        "run": name,
        "seconds": round(median[name], 2),
        "range": f"{min(values):.2f} - {max(values):.2f}",
        "over full depth": round(median[name] / median["full depth"], 2),
        "over the same without": ""
        if replaced == name
        else f"{median[name] / median[replaced]:.2f}",
      }
    )
  return lines


def result(lines: list[dict[str, str | float]], count: int) -> dict[str, Any]:
  """What `scripts/tables.py` reads."""
  return {
    "command": shlex.join(["python", "scripts/benchmark_lists.py", *sys.argv[1:]]),
    "columns": list(lines[0]),
    "align": ["left", "right", "right", "right", "right"],
    "rows": lines,
    "machine": f"two shared CPU cores; {count} prompts",
    "versions": {
      "calm": calm.__version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
  }


def main(arguments: list[str] | None = None) -> int:
  """Times the rows, prints the table, and writes the seconds where asked."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags_lib.add_model(parser)
  parser.add_argument("--thresholds", help="strictly descending, comma-separated")
  parser.add_argument("--threshold", type=float, help="one to time a list at, with refill")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  flags = parser.parse_args(arguments)
  if flags.repeats < 1:
    parser.error(f"Expected `--repeats` of 1 or more, got {flags.repeats}.")
  model = inference.load(flags.model, **flags_lib.decode_options(flags))
  prompts = list(flags_lib.open_prompts(flags))
  levels = generate.parse_grid(flags.thresholds, model.options)
  seconds = measure(rows(model, prompts, levels, flags.threshold), flags.repeats)
  print(f"{len(prompts)} prompts, batches of {model.options.batch_size}\n")
  made = result(table(seconds), len(prompts))
  print(tables.table(made))
  if flags.output:
    storage.write_atomically(flags.output, json.dumps(made, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
