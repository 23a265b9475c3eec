r"""What exact decoding costs where drafts are never right: the packed model, layer k's least
likely tokens for drafts, beside full depth.

Lists of prompts, of which a `Predictor` learns that drafts do not pay, and single batches, each
the first that it decodes. A program is x0.97 to x1.03 as fast as the same one compiled in
another process, so there are several, one after the other: cells are medians over them. Every
few batches the variants take turns; what a turn took is told beside full depth's turn, by the
median over the repeats, and a list is the mean of its turns.

  python scripts/benchmark_nonsense.py --data=data --tasks=synopsis,qa --batch_sizes=1,2
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import benchmark
import benchmark_exact as exact
import jax
import numpy as np

from calm import exits, inference, storage
from calm.inference import drafts
from calm.paper import tasks

# Batches of a turn: a program's first one finds another's code in the processor's caches.
IN_TURN = 8
COLUMNS = (
  *("setting", "rule", "ms a token", "x full depth", "least", "most"),
  *("tokens a pass", "texts equal"),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  words = lambda text: tuple(part for part in text.split(",") if part)
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--tasks", type=words, default=("synopsis",), help="synopsis, qa, enfr")
  add("--data", type=pathlib.Path, required=True, help="folder of the data sets")
  add("--rule", default="2x7", help="KxG, K layers and G drafts")
  add("--batch_sizes", type=lambda text: [int(x) for x in words(text)], default=[1])
  add("--num_prompts", type=int, default=96)
  add("--repeats", type=int, default=5, help="of a process; one more, which compiles")
  add("--processes", type=int, default=5)
  add("--results", help="writes scripts/results/RESULTS.json, for scripts/tables.py")
  add("--part", action="store_true", help=argparse.SUPPRESS)  # one of the processes
  return parser.parse_args(arguments)


@dataclasses.dataclass
class Variant:
  """A list of prompts, decoded batch by batch, beside others.

  Attributes:
    rule: how.
    alone: whether every batch is the first; else the first batch of a list is.
    known: what the model remembers of drafts.
    seconds: of every repeat and batch.
    made: the last repeat's generations.
  """

  rule: exits.Rule
  alone: bool = False
  known: dict[Any, drafts.Expected] = dataclasses.field(default_factory=dict)
  seconds: list[list[float]] = dataclasses.field(default_factory=list)
  made: list[Any] = dataclasses.field(default_factory=list)

  def begin(self) -> None:
    """Of a repeat."""
    self.forget()
    self.made = []
    self.seconds.append([])

  def forget(self) -> None:
    """Lets the model know nothing of drafts, but for what passes cost."""
    self.known = {
      key: drafts.Expected(known.must, plans=known.plans) for key, known in self.known.items()
    }

  def decode(self, model: inference.Predictor, encoded, active) -> None:
    """One batch, timed."""
    if self.alone:
      self.forget()
    vars(model)["expected_drafts"] = self.known
    start = time.perf_counter()
    made = model.decode(encoded, active, 1.0, self.rule)
    self.seconds[-1].append(time.perf_counter() - start)
    self.made.append(made)

  @property
  def turns(self) -> np.ndarray:
    """Seconds of every turn, [repeats, turns], but for the first repeat, which compiles."""
    seconds = np.array(self.seconds[1:])
    return np.add.reduceat(seconds, np.arange(0, seconds.shape[1], IN_TURN), axis=1)

  def seconds_beside(self, full: "Variant") -> float:
    """Seconds of a list, where full depth's turns take their medians."""
    usual = np.median(full.turns, axis=0)
    return float(np.sum(usual * np.median(self.turns / full.turns, axis=0)))


def nonsensical(task: Any, size: int) -> inference.Predictor:
  """The packed model, whose layer k drafts what it finds least likely."""
  model = exact.packed(task, size)
  decoder = model.weights.decoder
  assert decoder.shortlist is not None  # the box has one
  decoder = dataclasses.replace(decoder, shortlist=-decoder.shortlist)
  vars(model)["weights"] = dataclasses.replace(model.weights, decoder=decoder)
  return model


def variants(text: str) -> dict[str, Variant]:
  """Full depth, and lists and single batches of drafts that are never right."""
  layer, count = map(int, text.split("x"))
  rule = exits.Verified(layer, count, stop_below=0.0)
  words = f"k = {layer}, {count} drafts of nonsense"
  return {
    "full depth": Variant(exits.StaticExit()),
    words: Variant(rule),
    f"{words}, every batch the first": Variant(rule, alone=True),
  }


def rows(name: str, size: int, flags: argparse.Namespace) -> list[dict[str, Any]]:
  """What this process measures of a task."""
  task = tasks.task(name)
  model, timed = nonsensical(task, size), variants(flags.rule)
  prompts = tasks.read_prompts(flags.data, task, "test", limit=flags.num_prompts)
  batches = [(model.encode(b), b.active) for b in model.plan([p.input for p in prompts])]
  for repeat in range(flags.repeats + 1):
    for variant in timed.values():
      variant.begin()
    for number, first in enumerate(range(0, len(batches), IN_TURN), start=repeat):
      order = list(timed.values())
      for variant in order[number % len(order) :] + order[: number % len(order)]:
        for encoded, active in batches[first : first + IN_TURN]:
          variant.decode(model, encoded, active)
  full = timed["full depth"]
  tokens = sum(int(np.sum(batch.tokens > 0)) for batch in full.made)
  setting = f"packed, {task.title}, {len(prompts)} prompts, B = {size}"
  lines = []
  for key, variant in timed.items():
    pairs = zip((b.tokens for b in variant.made), (b.tokens for b in full.made), strict=True)
    equal = sum(int(np.sum(np.all(a == b, axis=1) & np.any(b > 0, axis=1))) for a, b in pairs)
    passes = [b.verification.passes for b in variant.made if b.verification is not None]
    line = {
      "setting": setting,
      "rule": key,
      "ms a token": 1e3 * variant.seconds_beside(full) / tokens,
      "x full depth": full.seconds_beside(full) / variant.seconds_beside(full),
      "tokens a pass": tokens / sum(int(np.sum(each)) for each in passes) if passes else None,
      "texts equal": f"{equal} of {len(prompts)}",
    }
    lines.append(line)
  return lines


def together(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
  """The rows of all processes in one."""
  made = []
  for lines in zip(*parts, strict=True):
    ratios = [line["x full depth"] for line in lines]
    passes = [line["tokens a pass"] for line in lines]
    own = {
      "ms a token": statistics.median(line["ms a token"] for line in lines),
      "x full depth": statistics.median(ratios),
      "least": min(ratios),
      "most": max(ratios),
      "tokens a pass": None if passes[0] is None else statistics.median(passes),
      # Of the process in which fewest were.
      "texts equal": min((line["texts equal"] for line in lines), key=_number),
    }
    made.append(lines[0] | own)
  return made


def _number(text: str) -> int:
  return int(text.split()[0])


def part(flags: argparse.Namespace) -> int:
  """One of the processes: a line of JSON for every row."""
  for name, size in itertools.product(flags.tasks, flags.batch_sizes):
    for line in rows(name, size, flags):
      print(json.dumps(line), flush=True)
    jax.clear_caches()
  return 0


def main(arguments: list[str] | None = None) -> int:
  """Runs the processes; prints the rows, and writes them where asked."""
  flags = parse(arguments)
  if flags.part:
    return part(flags)
  about, parts = benchmark.machine(), []
  given = sys.argv[1:] if arguments is None else arguments
  for number in range(flags.processes):
    command = [sys.executable, __file__, *given, "--part"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    parts.append([json.loads(line) for line in done.stdout.splitlines()])
    print(f"process {number + 1} of {flags.processes} done", file=sys.stderr, flush=True)
  made = together(parts)
  for line in made:
    print(json.dumps(line))
  if flags.results:
    result = {
      "command": about["command"],
      "columns": COLUMNS,
      "rows": [[line[name] for name in COLUMNS] for line in made],
      "versions": {name: about["versions"][name] for name in ("jax", "numpy")},
      "machine": f"{about['cpu']}, {about['cores']} cores",
    }
    path = pathlib.Path(__file__).parent / "results" / f"{flags.results}.json"
    storage.write_atomically(path, json.dumps(result, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
