r"""How fast exact decoding from a model's own exits is, beside the full model.

Random weights agree with themselves about nothing, so acceptance is forced: a coin with the
given chance says whether a draft is accepted, and everything is computed as if it were asked.
Every repeat throws other coins.
The packed model decodes real prompts, one at a time, and its texts are compared.

  python scripts/benchmark_exact.py --shapes=small --chances=0.74,0.84 --results=exact_small
  python scripts/benchmark_exact.py --data=data --tasks=synopsis --rules=2x4,3x7

A rule KxG drafts G tokens at most with K layers. Every repeat runs every row once, the other
way about every second time; a first round, which compiles, is not counted. Medians, also of the
ratios to full depth in the same repeat ('x same reading': that reads its weights in the same
way); 'x in all' is the ratio of all repeats' seconds, in which texts whose coins were lucky
count.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import benchmark_models as models
import harness
import jax
import jax.numpy as jnp
import numpy as np
import tables
from flax import struct

from calm import exits, inference
from calm.decode import acceptance, compiled, program, speculative
from calm.inference import timing
from calm.paper import tasks

SHORTLIST = {"small": 2048, "tiny": 32}


@struct.dataclass
class ForcedRead:
  """What `speculative.Passes` has read of a position of every row, and where that is."""

  inner: Any
  positions: jax.Array

  @property
  def hidden(self) -> jax.Array:
    """d^k, [batch, emb]."""
    return self.inner.hidden


@dataclasses.dataclass(frozen=True)
class Forced:
  """`speculative.Passes` whose drafts are accepted by a coin; all that is computed stays.

  A position has its draft, whatever layers say; what the full model says there is that token or
  another one.

  Attributes:
    inner: the passes.
    chance: that a draft is accepted, [].
    text: its number, which says where the coins begin, [].
    sure: whether drafts are as good as certain whatever the chance; else they say the chance.
  """

  inner: Any
  chance: jax.Array
  text: jax.Array
  sure: bool

  def __getattr__(self, name: str) -> Any:
    return getattr(self.inner, name)

  def read(self, cache, token, positions):
    read, cache = self.inner.read(cache, token, positions)
    return ForcedRead(read, positions), cache

  def draft(self, read):
    made = self.inner.draft(read.inner)
    # As sure as the coin is, or never sure enough to stop.
    sure = jnp.where(self.sure, 1.0, self.chance)
    # The head's own answer stays in use, or it would not be computed.
    confidence = jnp.maximum(sure, made.confidence * 1e-9)
    token = jnp.where(made.token < 0, made.token, self._draft(read.positions))
    return dataclasses.replace(made, token=token, confidence=confidence)

  def verify(self, cache, positions, pending: speculative.Pending):
    output, cache = self.inner.verify(cache, positions, pending)
    at = positions[:, None] + jnp.arange(pending.tokens.shape[1])[None, :]
    return dataclasses.replace(output, token=self._said(at, output.token)), cache

  def verify_one(self, cache, positions, read):
    best, gap, cache = self.inner.verify_one(cache, positions, read.inner)
    said = self._said(positions, best.token)
    return dataclasses.replace(best, token=said), gap, cache

  def _draft(self, at: jax.Array) -> jax.Array:
    """The draft at these positions."""
    return 4 + 2 * (at % 997)

  def _said(self, at: jax.Array, own: jax.Array) -> jax.Array:
    """What the full model is to say there; its `own` answer stays in use."""
    draft = self._draft(at)
    return jnp.where(own < 0, own, jnp.where(self._coins(at), draft, draft + 1))

  def _coins(self, at: jax.Array) -> jax.Array:
    """Which drafts at these positions are right."""
    coins = jnp.asarray(np.random.default_rng(3).random(997), jnp.float32) < self.chance
    return coins[(at + 101 * self.text) % 997]


@dataclasses.dataclass(frozen=True)
class ForcedProgram:
  """A program of `exits.Speculative` whose drafts are accepted by a coin."""

  program: program.Program
  sure: bool

  @compiled.method()
  def decode(self, weights, encoded, active, chance, text, prior):
    """As `Program.decode`."""
    made = self.program.speculation(weights, encoded, jnp.ones(()), prior)
    forced = Forced(made.passes, chance, text, self.sure)
    return dataclasses.replace(made, passes=forced).decode(active).generation


@dataclasses.dataclass
class Texts:
  """Decodes a batch again and again, as `Predictor.generate` decodes one batch after another.

  Attributes:
    decode: given a text's number and what is expected of its drafts.
    learns: whether a batch begins with what those before it had; else as the first of all.
    prior: that expectation.
    number: of the next text.
  """

  decode: Callable[[np.int32, acceptance.Prior], Any]
  learns: bool
  prior: acceptance.Prior = acceptance.UNKNOWN
  number: int = 0

  def __call__(self) -> Any:
    made = self.decode(np.int32(self.number), tuple(map(np.float32, self.prior)))
    self.number += 1
    if self.learns:
      seen = jax.device_get(made.verification)
      known = zip(seen.chance.tolist(), seen.calibration.tolist(), strict=True)
      self.prior = acceptance.later_prior(self.prior, list(known))
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  words = lambda text: tuple(part for part in text.split(",") if part)
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--shapes", type=words, default=(), help=f"random weights: {list(SHORTLIST)}")
  add("--readings", type=words, default=("int8",), help=f"too: {dict(models.READINGS)}")
  add("--tasks", type=words, default=(), help="of the packed model: synopsis, qa, enfr")
  add("--data", type=pathlib.Path, help="folder of the data sets")
  add("--rules", type=words, default=("2x7",), help="KxG, K layers and G drafts")
  add("--heads", type=words, default=("shortlist",), help="draft heads: shortlist, full")
  add("--chances", type=lambda text: [float(x) for x in words(text)], default=[0.84])
  add("--batch_sizes", type=lambda text: [int(x) for x in words(text)], default=[1])
  add("--input_length", type=int, default=128)
  add("--decode_length", type=int, default=64)
  add("--num_prompts", type=int, default=60)
  add("--compare", type=int, help="prompts whose texts are compared (default: those timed)")
  add("--repeats", type=int, default=7)
  add("--fixed", action="store_true", help="draft as many whatever is accepted")
  add("--sure", action="store_true", help="random weights' drafts say they are certain")
  add("--learn", action="store_true", help="random weights: texts begin as those before ended")
  add("--results", help="writes scripts/results/RESULTS.json, for scripts/tables.py")
  return parser.parse_args(arguments)


def rules(flags: argparse.Namespace) -> dict[str, exits.Speculative]:
  """Name -> rule."""
  made = {}
  for text in flags.rules:
    for head in flags.heads:
      layer, drafts = map(int, text.split("x"))
      rule = exits.Speculative(layer, drafts, head, adapts=not flags.fixed)
      made[f"k = {layer}, {drafts} drafts, {head}"] = rule
  return made


def forced_rows(shape: str, size: int, flags: argparse.Namespace) -> list[dict[str, Any]]:
  """Random weights: milliseconds a token of the full model and of every rule and chance."""
  model, length = models.load(shape, "float32", SHORTLIST[shape]), flags.decode_length
  setting = models.Setting(shape, size, flags.input_length, length)
  tokens, active = models.batches(model, setting)[0], np.ones(size, bool)
  full = program.Program(model.config, exits.StaticExit(), length, models.NO_EOS)
  encoded = jax.block_until_ready(full.encode(model.weights, tokens))
  timed: dict[str, Callable[[], Any]] = {}
  one = np.float32(1.0)
  for words, variant in models.read(model, flags.readings).items():
    suffix = f", {words}" if words else ""
    timed[f"full depth{suffix}"] = functools.partial(
      full.decode, variant.weights, encoded, active, one
    )
    for name, rule in rules(flags).items():
      plain = program.Program(model.config, rule, length, models.NO_EOS)
      forced = ForcedProgram(plain, flags.sure)
      for chance in map(np.float32, flags.chances):
        timed[f"{name}, accepted {chance:.2f}{suffix}"] = Texts(
          functools.partial(forced.decode, variant.weights, encoded, active, chance),
          flags.learn,
        )
  runs = harness.in_turn(timed, flags.repeats)
  lines, base, own = [], runs["full depth"].seconds, runs["full depth"].seconds
  for name, run in runs.items():
    own = run.seconds if name.startswith("full depth") else own
    line = row(f"{shape}, B = {size}", name, run.seconds, base, length, run.results)
    lines.append(line | {"x same reading": harness.ratio(own, run.seconds).median})
  return lines


def row(setting, name, seconds, base, tokens, generations) -> dict[str, Any]:
  """One row of the table; `base` are full depth's seconds in the same repeats."""
  seen = [made.verification for made in generations if made.verification is not None]
  passes = float(np.mean([one.passes for one in seen])) if seen else None
  drafts = sum(int(np.sum(one.drafts)) for one in seen)
  share = sum(int(np.sum(one.drafted)) for one in seen) / max(drafts, 1) if seen else None
  middle = statistics.median(seconds)
  return {
    "setting": setting,
    "rule": name,
    "ms a token": 1e3 * middle / tokens,
    "x full depth": harness.ratio(base, seconds).median,
    "x same reading": None,
    "x in all": sum(base) / sum(seconds),
    "spread": f"{1e3 * min(seconds) / tokens:.2f} - {1e3 * max(seconds) / tokens:.2f}",
    "drafts accepted": share,
    "tokens a pass": None if passes is None else tokens / passes,
  }


def packed(task: Any, batch_size: int) -> inference.Predictor:
  """The packed model as it decodes a task."""
  return inference.load(
    "packed",
    task_prefix=task.prefix,
    max_input_length=task.max_input_length,
    max_decode_length=task.max_decode_length,
    batch_size=batch_size,
  )


def packed_rows(name: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
  """The packed model on prompts of a task, one at a time: seconds, and whether texts agree."""
  task = tasks.task(name)
  model = packed(task, 1)
  prompts = tasks.read_prompts(flags.data, task, "test", limit=flags.num_prompts)
  settings = [timing.Setting(name, rule, 1.0) for name, rule in rules(flags).items()]
  timed = timing.measure(model, prompts, settings, rounds=flags.repeats)
  compared = flags.compare or len(prompts)
  texts = [p.input for p in tasks.read_prompts(flags.data, task, "test", limit=compared)]
  full = model.generate(texts, rule=exits.StaticExit())
  tokens = sum(len(output.tokens) for output in full)
  timed_tokens = sum(len(output.tokens) for output in full[: len(prompts)])
  made = []
  for own in timed.rows:
    rule = rules(flags).get(own.name)
    outputs = full if rule is None else model.generate(texts, rule=rule)
    equal = sum(a.tokens == b.tokens for a, b in zip(full, outputs, strict=True))
    passes, drafts = sum(o.passes for o in outputs), sum(o.drafts for o in outputs)
    accepted = sum(sum(o.drafted) for o in outputs)
    made.append(
      {
        "setting": f"packed, {task.title}, {len(prompts)} prompts one at a time",
        "rule": own.name,
        "ms a token": 1e3 * own.decode_seconds * len(prompts) / timed_tokens,
        "x full depth": own.speedup,
        "x same reading": None,
        "x in all": None,
        "spread": None,
        "drafts accepted": accepted / drafts if drafts else None,
        "tokens a pass": tokens / passes if passes else None,
        "texts equal": f"{equal} of {len(texts)}",
      }
    )
  return made


def main(arguments: list[str] | None = None) -> int:
  """Times what is asked for; prints the rows, and writes them where asked."""
  flags = parse(arguments)
  sizes = itertools.product(flags.shapes, flags.batch_sizes)
  made = [line for shape, size in sizes for line in forced_rows(shape, size, flags)]
  made += [line for name in flags.tasks for line in packed_rows(name, flags)]
  columns = [name for name in made[-1] if any(line.get(name) is not None for line in made)]
  for line in made:
    print(json.dumps(line))
  if flags.results:
    tables.write(
      tables.RESULTS / f"{flags.results}.json",
      columns,
      [[line.get(name) for name in columns] for line in made],
      machine=harness.machine(),
      packages=("jax", "numpy"),
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
