"""Would rows out of step pay on a TPU? Simulated on its compiler's cycles and recorded exits.

In step, every row of a core decodes its token at the same time, and the deepest row decides how
many segments of layers are run (`engines.Deferred`; rows that end are replaced at once). Out of
step, a core keeps more rows in flight than a step computes: rows wait for their next segment of
layers, which runs when enough of them wait for it. Their tokens then lie at places of their own
in the caches, layer by layer: written one row after the other, or all caches over, whichever is
less.

Cycles: T5 1.1 small, softmax after layers 2 and 4, compiled for TPU v3, estimated by its
compiler; nothing ran there. Exits: of the model in the box on its own prompts, threshold 0.2.

  pip install '.[tpu]'   (x86 Linux)
  python scripts/tpu_rows.py
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tpu_hlo
import tpu_report
from jax import lax
from jax.experimental import topologies

import calm
from calm import inference, storage
from calm.decode.engines import deferred
from calm.exits import confidence
from calm.t5 import platforms

OUTPUT = pathlib.Path(__file__).parent / "results" / "tpu_rows.json"
# As the model in the box leaves, at about what is certified for delta = 0.1.
ALLOWED, THRESHOLD = (2, 4), 0.38
LAYERS = (2, 2, 4)  # of the segments between them
ROWS = (8, 32, 128)
LENGTH, INPUT = 64, 128
TOKENS = 20_000  # simulated, by each design


@dataclasses.dataclass(frozen=True)
class Costs:
  """Thousands of cycles at some number of rows.

  Attributes:
    segments: of each segment: layers 1 and 2 with the step's rest, 3 and 4, 5 to 8.
    attention: of these, what is spent on caches: scores, weights, mixed values.
    fills: of each segment, (positions filled together, thousands of cycles), descending.
    writes: keys and values of half as many rows, each at a place of its own, of one layer.
  """

  segments: tuple[float, ...]
  attention: tuple[float, ...]
  fills: tuple[tuple[tuple[int, float], ...], ...]
  writes: float

  def step(self, deepest: int) -> float:
    """A step whose deepest row needs this many segments."""
    return sum(self.segments[:deepest])

  def fill(self, segment: int, pending: int) -> float:
    """What a segment that was skipped at `pending` tokens is filled with before it runs."""
    total = 0.0
    for chunk, cycles in self.fills[segment]:
      least = 1 if (chunk, cycles) == self.fills[segment][-1] else 2
      while pending >= least:
        pending, total = pending - chunk, total + cycles
    return total


def costs(topology: str, rows: int) -> Costs:
  """As the compiler estimates them."""
  config = tpu_report.configuration("small")
  made = tpu_report.compiled(
    topology, config, "deferred", None, (rows, INPUT, LENGTH), confidence.Softmax(), ALLOWED
  )
  path = tpu_report.PATHS["deferred"]
  head = f"{rows},{config.num_heads}"

  def by_segment(counts: Callable[[tpu_hlo.Instruction], bool]) -> tuple[float, ...]:
    totals = [tpu_hlo.step_cycles(made.module, path, k, counts) / 1e3 for k in (1, 2, 3)]
    return tuple(b - a for a, b in itertools.pairwise([0.0, *totals]))

  # Products with keys and values, and what is per row and head.
  attends = lambda x: bool(
    re.search(r"bh[cl],bl[cd]", x.text) or re.match(rf"\(?\w+\[{head}[,\]]", x.shape)
  )
  with platforms.laid_out_for("tpu"):
    chunks = deferred.chunk_sizes(rows, LENGTH, deferred.Deferred.chunk_rows)
  loops = [x for x in made.module.computations[made.module.token_loop()] if x.opcode == "while"]
  fills = [_fills(made.module, loop.called("body"), chunks) for loop in loops]
  width = config.num_heads * config.head_dim
  writes = 2 * min(written(topology, rows, width, all_rows) for all_rows in (False, True))
  return Costs(by_segment(lambda _: True), by_segment(attends), ((), *fills), writes)


def written(topology: str, rows: int, width: int, all_rows: bool) -> float:
  """Thousands of cycles of writing half of a cache's rows, each at its own position.

  Args:
    topology: whose compiler is asked.
    rows: of the cache.
    width: numbers of a position.
    all_rows: whether the whole cache is written over, with a choice at every place; otherwise
      row after row, since of a scatter the compiler tells only what prepares it.
  """
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  there = jax.sharding.SingleDeviceSharding(device)
  shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=there)

  def one(i, cache, new, at):
    row = lax.dynamic_slice_in_dim(new, i, 1)[:, None]
    return lax.dynamic_update_slice(cache, row, (2 * i, at[i], 0))

  def write(cache, new, at):
    if all_rows:
      here = jnp.arange(LENGTH)[None, :, None] == at[:, None, None]
      return jnp.where(here, new[:, None], cache)
    return lax.fori_loop(0, len(new), lambda i, cache: one(i, cache, new, at), cache)

  def token_loop(cache, new, at, steps):
    step = lambda i, cache: write(cache, new + i.astype(new.dtype), at + i)
    return lax.fori_loop(0, steps, step, cache)

  count = rows if all_rows else rows // 2
  cache, new = ((rows, LENGTH, width), (count, width))
  made = jax.jit(token_loop, donate_argnums=0).lower(
    *(shaped(shape, jnp.bfloat16) for shape in (cache, new)),
    shaped((count,), jnp.int32),
    shaped((), jnp.int32),
  )
  module = tpu_hlo.parse(made.compile().as_text() or "")
  cycles = lambda body: sum(x.cycles or 0 for x in module.computations[body])
  outer = module.token_while().called("body")
  inner = [x for x in module.computations[outer] if x.opcode == "while"]
  return (cycles(outer) + count * sum(cycles(x.called("body")) for x in inner)) / 1e3


def _fills(
  module: tpu_hlo.Module, body: str, chunks: tuple[int, ...]
) -> tuple[tuple[int, float], ...]:
  """The loops of a segment's body, which fill its layers: all layers' of a size together."""
  cycles = sorted(
    sum(x.cycles or 0 for x in module.computations[loop.called("body")]) / 1e3
    for loop in module.computations[body]
    if loop.opcode == "while"
  )
  each = len(cycles) // len(chunks)  # layers; the larger size is the dearer
  parts = [sum(cycles[i * each : (i + 1) * each]) for i in range(len(chunks))]
  return tuple(zip(chunks, reversed(parts), strict=True))


def recorded_exits() -> list[list[int]]:
  """Segments that each token of each prompt needs, of the model in the box."""
  path = inference.PACKED / "prompts_calibration.jsonl"
  prompts = [json.loads(line)["input"] for line in path.read_text("utf-8").splitlines()]
  model = calm.load("packed", measure="softmax", exit_layers=ALLOWED)
  made = model.generate(prompts, threshold=THRESHOLD)
  segment = {ALLOWED[0]: 1, ALLOWED[1]: 2, model.num_layers: 3}
  return [[segment[layer] for layer in one.exit_layers] for one in made]


def in_step(exits: Sequence[Sequence[int]], rows: int, cost: Costs) -> float:
  """Thousands of cycles a token."""
  texts = itertools.cycle(exits)
  at = [iter(next(texts)) for _ in range(rows)]
  pending, total, tokens = [0, 0, 0], 0.0, 0
  while tokens < TOKENS:
    needs = []
    for i in range(rows):
      need = next(at[i], None)
      while need is None:
        at[i] = iter(next(texts))
        need = next(at[i], None)
      needs.append(need)
    deepest = max(needs)
    for segment in range(3):
      if segment < deepest:
        total += cost.fill(segment, pending[segment]) if segment else 0.0
        pending[segment] = 0
      else:
        pending[segment] += 1
    total, tokens = total + cost.step(deepest), tokens + rows
  return total / tokens


class _Row:
  """A row in flight, one text after another: what its token needs, what it has skipped.

  Attributes:
    need: segments of the token that it is at.
    pending: tokens that each segment was skipped at since it last ran.
  """

  def __init__(self, texts: Iterator[Sequence[int]]):
    self._texts, self._text = texts, iter(())
    self.need, self.pending = 0, [0, 0, 0]
    self.begin()

  def begin(self) -> None:
    """Goes on to the next token, of this text or of another."""
    for segment in range(self.need, 3):
      self.pending[segment] += 1
    need = next(self._text, None)
    while need is None:
      self._text, self.pending = iter(next(self._texts)), [0, 0, 0]
      need = next(self._text, None)
    self.need = need


def out_of_step(
  exits: Sequence[Sequence[int]], rows: int, in_flight: int, cost: Costs
) -> float:
  """Thousands of cycles a token; a segment of `rows` rows at a time, of `in_flight`.

  Rows that a segment runs for are filled together, so often as the one needs that has skipped
  it most. Left out, so that the figure is a bound from below: the places in the caches that a
  row leaves empty while it waits, and what gathers rows and puts them back.
  """
  texts = itertools.cycle(exits)
  waiting: list[list[_Row]] = [[_Row(texts) for _ in range(in_flight)], [], []]
  total, tokens = 0.0, 0
  while tokens < TOKENS:
    full = [s for s in (2, 1, 0) if len(waiting[s]) >= rows]
    segment = full[0] if full else max(range(3), key=lambda s: len(waiting[s]))
    taken, waiting[segment] = waiting[segment][:rows], waiting[segment][rows:]
    skipped = max(one.pending[segment] for one in taken)
    total += cost.segments[segment] + (cost.fill(segment, skipped) if segment else 0.0)
    for one in taken:
      one.pending[segment] = 0
      deeper = one.need > segment + 1
      if not deeper:
        one.begin()
        tokens += 1
      waiting[segment + 1 if deeper else 0].append(one)
  return total / tokens


def row(rows: int, exits: Sequence[Sequence[int]], by_rows: dict[int, Costs]) -> list[Any]:
  """One line of the table. Rows that wait cost nothing, their attention, all of it; and their
  attention where every row writes at a place of its own."""
  in_flight = 2 * rows
  narrow, wide = by_rows[rows], by_rows[in_flight]
  parts = zip(narrow.segments, narrow.attention, wide.attention, strict=True)
  attended = dataclasses.replace(narrow, segments=tuple(s - a + b for s, a, b in parts))
  layers = zip(attended.segments, LAYERS, strict=True)
  writing = tuple(cycles + count * wide.writes for cycles, count in layers)
  costs = narrow, attended, wide, dataclasses.replace(attended, segments=writing)
  plain, same = in_step(exits, rows, narrow), in_step(exits, in_flight, wide)
  apart = [out_of_step(exits, rows, in_flight, cost) for cost in costs]
  beside = (f"{x:.1f} (x{plain / x:.2f}, x{same / x:.2f})" for x in apart)
  return [rows, f"{plain:.1f}", f"{same:.1f} (x{plain / same:.2f})", *beside]


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", default="v3:2x2")
  parser.add_argument("--output", default=OUTPUT, type=pathlib.Path)
  flags = parser.parse_args(arguments)
  if reason := tpu_report.available():
    raise SystemExit(
      f"Expected a machine that can compile for a TPU, got another ({reason}); take x86"
      " Linux with the compiler."
    )
  kept = json.loads(flags.output.read_text("utf-8")) if flags.output.exists() else {}
  if kept.get("versions") != tpu_report.versions():
    kept = {}
  exits = [[int(c) for c in text] for text in kept.get("exits", [])] or recorded_exits()
  by_rows = {int(k): Costs(**v) for k, v in kept.get("costs", {}).items()}
  for rows in sorted({*ROWS, *(2 * r for r in ROWS)}):
    if rows not in by_rows:
      by_rows[rows] = costs(flags.topology, rows)
      print(rows, by_rows[rows], flush=True)
    _write(flags.output, exits, by_rows)


def _write(path: pathlib.Path, exits: list[list[int]], by_rows: dict[int, Costs]) -> None:
  ready = [rows for rows in ROWS if {rows, 2 * rows} <= set(by_rows)]
  value = {
    "command": "python scripts/tpu_rows.py",
    "versions": tpu_report.versions(),
    "machine": "compiled for TPU v3, estimated by its compiler: nothing was run",
    "columns": [
      "rows of a step, a core",
      "in step, that many in flight",
      "in step, twice as many in flight",
      "out of step, twice as many; waiting rows free",
      "the same, all rows attend",
      "the same, all rows compute",
      "all rows attend, each writes at its own place",
    ],
    "align": ["right"] * 7,
    "rows": [row(rows, exits, by_rows) for rows in ready],
    "costs": {str(rows): dataclasses.asdict(cost) for rows, cost in by_rows.items()},
    "exits": ["".join(map(str, text)) for text in exits],
  }
  storage.write_atomically(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
  main()
