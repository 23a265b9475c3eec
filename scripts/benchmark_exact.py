"""How fast exact decoding from a model's own exits is, beside the full model.

  python scripts/benchmark_exact.py --data=data --tasks=synopsis --rules=2x4,3x7

The packed model decodes real prompts, one at a time, and its texts are
compared. A rule KxG drafts G tokens at most with K layers. Every repeat runs
every row once, the other way about every second time; a first round, which
compiles, is not counted. Medians, also of the ratios to full depth in the same
repeat.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import harness
import tables

from calm import exits, inference
from calm.inference import timing
from calm.paper import bench


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""

  def words(text):
    return tuple(part for part in text.split(",") if part)

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--tasks", type=words, default=("synopsis", "qa", "enfr"))
  add(
    "--data", type=pathlib.Path, required=True, help="folder of the data sets"
  )
  add(
    "--rules", type=words, default=("2x7",), help="KxG, K layers and G drafts"
  )
  add(
    "--heads",
    type=words,
    default=("shortlist",),
    help="draft heads: shortlist, full",
  )
  add("--num_prompts", type=int, default=60)
  add(
    "--compare",
    type=int,
    help="prompts whose texts are compared (default: those timed)",
  )
  add("--repeats", type=int, default=7)
  add(
    "--results",
    help="writes scripts/results/RESULTS.json, for scripts/tables.py",
  )
  return parser.parse_args(arguments)


def rules(flags: argparse.Namespace) -> dict[str, exits.Speculative]:
  """Name -> rule."""
  made = {}
  for text in flags.rules:
    for head in flags.heads:
      layer, drafts = map(int, text.split("x"))
      rule = exits.Speculative(layer, drafts, head)
      made[f"k = {layer}, {drafts} drafts, {head}"] = rule
  return made


def packed_rows(name: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
  """The packed model on prompts of a task, one at a time: seconds, and whether
  texts agree.
  """
  task = bench.task(name)
  model = inference.load(
    "packed",
    task_prefix=task.prefix,
    max_input_length=task.max_input_length,
    max_decode_length=task.max_decode_length,
    batch_size=1,
  )
  prompts = bench.read_prompts(
    flags.data, task, "test", limit=flags.num_prompts
  )
  settings = [
    timing.Setting(name, rule, 1.0) for name, rule in rules(flags).items()
  ]
  timed = timing.measure(model, prompts, settings, rounds=flags.repeats)
  compared = flags.compare or len(prompts)
  texts = [
    p.input
    for p in bench.read_prompts(flags.data, task, "test", limit=compared)
  ]
  full = model.generate(texts, rule=exits.StaticExit())
  tokens = sum(len(output.tokens) for output in full)
  timed_tokens = sum(len(output.tokens) for output in full[: len(prompts)])
  made = []
  for own in timed.rows:
    rule = rules(flags).get(own.name)
    outputs = full if rule is None else model.generate(texts, rule=rule)
    equal = sum(
      a.tokens == b.tokens for a, b in zip(full, outputs, strict=True)
    )
    passes = sum(o.passes for o in outputs)
    drafts = sum(o.drafts for o in outputs)
    accepted = sum(sum(o.drafted) for o in outputs)
    made.append(
      {
        "setting": f"packed, {task.title}, {len(prompts)} prompts one at a"
        " time",
        "rule": own.name,
        "ms a token": 1e3 * own.decode_seconds * len(prompts) / timed_tokens,
        "x full depth": own.speedup,
        "drafts accepted": accepted / drafts if drafts else None,
        "tokens a pass": tokens / passes if passes else None,
        "texts equal": f"{equal} of {len(texts)}",
      }
    )
  return made


def main(arguments: list[str] | None = None) -> int:
  """Times what is asked for; prints the rows, and writes them where asked."""
  flags = parse(arguments)
  made = [line for name in flags.tasks for line in packed_rows(name, flags)]
  columns = list(made[-1])
  for line in made:
    print(json.dumps(line))
  if flags.results:
    tables.write(
      tables.RESULTS / f"{flags.results}.json",
      columns,
      [list(line.values()) for line in made],
      machine=harness.machine(),
      packages=("jax", "numpy"),
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
