r"""What a generous limit costs texts that end long before it, and those that reach it.

  python scripts/benchmark_limits.py --data=data --results=limits

Prompts of the model in the box, in batches of one padded length: one program whose caches hold
the whole limit, beside stages (`decode.staged`), in turn in one process. Texts that reach the
limit are made by a model that never says that it ends. Seconds are of the decoder alone; a
grid's are of its files too, and its tokens those of all its thresholds.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Sequence
from typing import Any

import benchmark
import jax
import numpy as np
import tables

from calm import calibrate, exits, inference, storage
from calm.decode import staged
from calm.exits import schedules
from calm.inference import grid, timing
from calm.paper import tasks

# No piece has this number: a text ends at its limit.
NEVER_ENDS = -1
THRESHOLDS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1)

# Makes texts again, each as its tokens.
Run = Callable[[], list[list[int]]]


def runs(
  model: inference.Predictor, texts: Sequence[str], rule: Any, threshold: float, ends: bool
) -> dict[str, Run]:
  """name -> decodes all batches: in one program, and in stages."""
  batches = [(batch.active, model.encode(batch)) for batch in model.plan(texts)]
  whole = model.program(rule)
  if not ends:
    whole = dataclasses.replace(whole, eos_id=NEVER_ENDS)

  def run(program) -> list[list[int]]:
    said = []
    for active, encoded in batches:
      made = program.decode(model.weights, encoded, active, np.float32(threshold))
      made = jax.device_get(made)
      rows = zip(made.tokens, made.num_tokens, active, strict=True)
      said += [tokens[:number].tolist() for tokens, number, is_text in rows if is_text]
    return said

  stages = staged.staged(whole)
  return {"one program": lambda: run(whole), "stages": lambda: run(stages)}


def grids(model: inference.Predictor, texts: Sequence[str]) -> dict[str, Run]:
  """The same of a grid of thresholds, as `calm generate` decodes it."""
  prompts = [calibrate.Prompt(str(i), text) for i, text in enumerate(texts)]
  encodings: dict[int, Any] = {}

  def run(first: int) -> list[list[int]]:
    patched = unittest.mock.patch.object(staged, "FIRST", first)
    with patched, tempfile.TemporaryDirectory() as folder:
      writer = calibrate.open_writer(
        folder, prompts=prompts, thresholds=THRESHOLDS, procedure=None
      )
      grid.generate(model, prompts, THRESHOLDS, writer, encodings=encodings)
      made = [writer.completed_records(x) for x in (schedules.NEVER_EXIT, *THRESHOLDS)]
    return [list(level[prompt.id].tokens or ()) for level in made for prompt in prompts]

  first = staged.FIRST
  limit = model.options.max_decode_length
  return {"one program": lambda: run(limit), "stages": lambda: run(first)}


def line(
  setting: dict[str, Any], made: dict[str, Run], count: int, repeats: int
) -> dict[str, Any]:
  """One row of the table: milliseconds of both, in turn, and whether tokens are the same."""
  said = {name: run() for name, run in made.items()}
  seconds: dict[str, list[float]] = {name: [] for name in made}
  for repeat in range(repeats):
    for name in list(made)[:: 1 if repeat % 2 else -1]:
      start = time.perf_counter()
      made[name]()
      seconds[name].append(time.perf_counter() - start)
  ratios = [a / b for a, b in zip(seconds["one program"], seconds["stages"], strict=True)]
  timed = {
    f"{name}, ms a text": 1e3 * statistics.median(seconds[name]) / count for name in made
  }
  tokens = sum(map(len, said["one program"])) / count
  same = "yes" if said["one program"] == said["stages"] else "no"
  x = statistics.median(ratios)
  return {**setting, "tokens a text": tokens, **timed, "x": x, "same tokens": same}


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
  """All rows."""
  task = tasks.task("synopsis")
  shared = {"task_prefix": task.prefix, "max_input_length": task.max_input_length}
  shared |= {"measure": "softmax", "exit_layers": (2, 4)}
  base, lines = inference.load("packed", **shared), []
  prompts = tasks.read_prompts(flags.data, task, "test", limit=10 * flags.num_prompts)
  texts = [prompt.input for prompt in timing.of_one_length(base, prompts, flags.num_prompts)]
  ways = {
    "full depth": (exits.StaticExit(), schedules.NEVER_EXIT),
    "exact": (inference.exact_rule(base), schedules.NEVER_EXIT),
    f"exits at {flags.threshold:g}": (None, flags.threshold),
  }
  for rows in flags.batch_sizes:
    for limit in flags.limits:
      model = base.with_options(max_decode_length=limit, batch_size=rows)
      for name, (rule, threshold) in ways.items():
        for ends in (True, False) if limit == flags.limits[-1] else (True,):
          texts_end = "end" if ends else "reach the limit"
          setting = {"rows": rows, "limit": limit, "texts": texts_end, "rule": name}
          some = texts if ends else texts[:rows]
          made = runs(model, some, rule, threshold, ends)
          lines.append(line(setting, made, len(some), flags.repeats))
          print(json.dumps(lines[-1]), file=sys.stderr)
      setting = {"rows": rows, "limit": limit, "texts": "end"}
      setting["rule"] = f"a grid of {len(THRESHOLDS)} thresholds"
      lines.append(line(setting, grids(model, texts), len(texts), flags.repeats))
      print(json.dumps(lines[-1]), file=sys.stderr)
  return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  numbers = lambda text: [int(number) for number in text.split(",")]
  parser.add_argument("--data", type=pathlib.Path, required=True, help="the data sets' folder")
  parser.add_argument("--limits", type=numbers, default=[128, 256, 512], help="ascending")
  parser.add_argument("--batch_sizes", type=numbers, default=[1, 8, 32])
  parser.add_argument("--threshold", type=float, default=0.2)
  parser.add_argument("--num_prompts", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--results", help="writes scripts/results/RESULTS.json")
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
  """Measures, prints the table, and writes it where asked."""
  flags = parse(arguments)
  about, lines = benchmark.machine(), measure(flags)
  result = {
    "command": about["command"],
    "columns": list(lines[0]),
    "rows": [list(row.values()) for row in lines],
    "versions": {name: about["versions"][name] for name in ("jax", "numpy")},
    "machine": f"{about['cpu']}, {about['cores']} cores",
  }
  print(tables.table(result))
  if flags.results:
    path = tables.RESULTS / f"{flags.results}.json"
    storage.write_atomically(path, json.dumps(result, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
