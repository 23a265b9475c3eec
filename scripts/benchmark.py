"""How fast decoding is: one command, one table.

Full depth, static k, and dynamic exits of every measure with exits forced to
known depths (so that the depth is the same whatever the weights) and to a mixed
trace; other people's decoders on the same weights where they are installed.
Every repeat runs every row once, so that drift hits all alike; compilation is
excluded and reported.

  python scripts/benchmark.py --shapes=small --batch_sizes=1
  --measures=classifier --peers= python scripts/benchmark.py --shapes=packed
  --thresholds=0.95,0.9 --batch_sizes=1,8
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import warnings
from typing import Any

import benchmark_models as models
import benchmark_peers as peers
import benchmark_systems as systems
import harness
import jax
import numpy as np
import tables

from calm.decode import sharded

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "llvmlite",
  "torch",
  "transformers",
)
PACKAGES += ("ctranslate2", "optimum", "onnxruntime", "openvino")
COLUMNS = (
  *(
    "setting",
    "system",
    "layers",
    "ms a step",
    "over static",
    "over full depth",
  ),
  *("with the encoder", "compile s"),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""

  def words(text):
    return tuple(part for part in text.split(",") if part)

  def ints(text):
    return tuple(int(part) for part in words(text))

  def floats(text):
    return tuple(float(part) for part in words(text))

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    "--shapes", type=words, default=("small", "packed"), help=str(models.SHAPES)
  )
  add("--batch_sizes", type=ints, default=(1, 8, 32))
  add("--input_lengths", type=ints, default=(128, 512))
  add("--decode_lengths", type=ints, default=(64, 512))
  add("--depths", type=ints, default=(1, 2, 4), help="static and forced exits")
  add(
    "--measures",
    type=words,
    default=("classifier", "probe", "state", "shortlist", "softmax"),
  )
  add(
    "--engines",
    type=words,
    default=tuple(systems.ENGINES),
    help="ways of running the loop",
  )
  add(
    "--readings",
    type=words,
    default=("int8",),
    help=f"ours too: {dict(models.READINGS)}",
  )
  add(
    "--num_devices",
    type=int,
    default=1,
    help="ours also over so many CPU devices",
  )
  add(
    "--thresholds",
    type=floats,
    default=(),
    help="real exits too, at these thresholds",
  )
  add(
    "--systems",
    type=words,
    default=(),
    help="only rows that contain one of these words",
  )
  add(
    "--exit_layers", type=ints, default=None, help="where tokens may leave; all"
  )
  add("--peers", type=words, default=tuple(peer.name for peer in peers.PEERS))
  add("--repeats", type=int, default=7)
  add("--num_prompts", type=int, default=16, help="prompts of the packed model")
  add(
    "--shortlist",
    type=int,
    default=512,
    help="tokens on a random model's shortlist",
  )
  add("--dtype", default="float32", help="ours and T5X's: float32 or bfloat16")
  add(
    "--results",
    help="writes scripts/results/RESULTS.json, for scripts/tables.py",
  )
  return parser.parse_args(arguments)


@dataclasses.dataclass(frozen=True)
class Row:
  """A system and its seconds; full depth's encoder counts where it has none of
  its own.
  """

  system: systems.System
  decode: harness.Timed
  encode: harness.Timed
  eos_id: int

  @property
  def steps(self) -> int:
    """Steps of the decoder over all batches."""
    return sum(
      int(lengths(t, self.eos_id).max()) for t in self.decode.result.tokens
    )

  @property
  def layers(self) -> float | None:
    """Mean decoder layers a token."""
    taken = self.decode.result.exit_layers
    if self.system.measured_layers is not None or taken is None:
      return self.system.measured_layers
    every = np.concatenate([layers.ravel() for layers in taken])
    return float(every[every > 0].mean())

  def milliseconds(self, *, encoder: bool = False) -> list[float]:
    """Milliseconds a step of every repeat."""
    both = zip(self.decode.seconds, self.encode.seconds, strict=True)
    if not self.system.by_difference:
      return [
        1e3 * (decode + encoder * encode) / self.steps
        for decode, encode in both
      ]
    if encoder:
      return [1e3 * seconds / self.steps for seconds in self.decode.seconds]
    steps = max(self.steps - len(self.decode.result.tokens), 1)
    return [1e3 * (decode - encode) / steps for decode, encode in both]


def measured(
  setting: models.Setting, options: argparse.Namespace, log
) -> list[Row]:
  """Times everything that is asked for in one setting."""
  model = models.load(setting.shape, options.dtype, options.shortlist)
  thresholds = options.thresholds if setting.shape == "packed" else ()
  every = systems.Ours(model, setting).systems(
    options.depths,
    options.measures,
    thresholds,
    options.engines,
    options.exit_layers,
  )
  for others, words in variants(model, setting, options):
    same = others.systems(
      (), options.measures, thresholds, ("default",), options.exit_layers
    )
    encode = (
      others.encode
      if any(models.READINGS[n] in words for n in models.ENCODES)
      else None
    )
    every += [
      dataclasses.replace(each, name=f"{each.name}, {words}", encode=encode)
      for each in same
    ]
  for peer in peers.PEERS:
    if peer.name in options.peers and not peers.not_installed(*peer.packages):
      every += peer.systems(model, setting, options.depths)
  chosen = [
    system
    for i, system in enumerate(every)
    if i == 0
    or not options.systems
    or any(word in system.name for word in options.systems)
  ]
  log(f"  {len(chosen)} systems, {options.repeats} repeats")
  runs = {system.name: system.decode for system in chosen}
  encoders = {
    f"encoder of {s.name}": s.encode for s in chosen if s.encode is not None
  }
  timed = harness.in_turn(runs | encoders, options.repeats)
  own = f"encoder of {chosen[0].name}"
  rows = []
  for system in chosen:
    decode = timed[system.name]
    encode = timed.get(f"encoder of {system.name}", timed[own])
    rows.append(Row(system, decode, encode, model.eos_id))
    for got, expected in zip(
      decode.result.exit_layers or (), system.exact or (), strict=False
    ):
      np.testing.assert_array_equal(
        got, expected, err_msg=f"exits of {system.name}"
      )
  return rows


def variants(
  model: models.Model, setting: models.Setting, options: argparse.Namespace
) -> list[tuple[systems.Ours, str]]:
  """Ours with weights read otherwise, over several devices, and both; with its
  words.
  """
  weights = models.read(model, options.readings)
  counts = {"": 1}
  if options.num_devices > 1 and setting.batch_size % options.num_devices == 0:
    counts[f"{options.num_devices} devices"] = options.num_devices
  return [
    (
      systems.Ours(
        weights[way], setting, counts[spread], way != models.READINGS["xla"]
      ),
      ", ".join(filter(None, (way, spread))),
    )
    for way, spread in itertools.product(weights, counts)
    if way or spread
  ]


def cells(setting: models.Setting, rows: list[Row]) -> list[list[Any]]:
  """The rows of the table, beside the static models of the same mean depth and
  full depth.
  """
  medians = [statistics.median(row.milliseconds()) for row in rows]
  static = {
    row.system.measured_layers: median
    for row, median in zip(rows, medians, strict=True)
    if not row.system.peer and row.system.measured_layers is not None
  }
  depths = sorted(static)
  lines = []
  for row, median in zip(rows, medians, strict=True):
    layers = row.layers
    over_static = None
    if (
      not row.system.peer
      and layers
      and len(depths) > 1
      and depths[0] <= layers <= depths[-1]
    ):
      over_static = median / float(
        np.interp(layers, depths, [static[d] for d in depths])
      )
    whole = statistics.median(row.milliseconds(encoder=True))
    compiling = max(row.decode.first - row.decode.median, 0.0)
    line = [str(setting), row.system.name, layers, median, over_static]
    lines.append([*line, median / medians[0], whole, compiling])
  return lines


def lengths(tokens: np.ndarray, eos_id: int) -> np.ndarray:
  """Tokens of each row, EOS included, [batch]."""
  tokens = np.asarray(tokens)
  ended = tokens == eos_id
  return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1])


def main(arguments: list[str] | None = None) -> int:
  """Runs the whole table; the results are written after every setting."""
  options = parse(arguments)
  sharded.make_cpu_devices(options.num_devices)
  # Compilation is reported: it must not come from disk.
  warnings.filterwarnings("ignore")  # peers' own
  jax.config.update("jax_enable_compilation_cache", False)

  def log(text):
    return print(text, file=sys.stderr, flush=True)

  for peer in peers.PEERS:
    if peer.name in options.peers and (
      why := peers.not_installed(*peer.packages)
    ):
      log(f"not installed: {peer.name} ({why})")
  settings = models.grid(options)
  lines = []
  result = {}
  path = (
    tables.RESULTS / f"{options.results}.json"
    if options.results
    else os.devnull
  )
  for number, setting in enumerate(settings, start=1):
    log(f"{setting} ({number} of {len(settings)})")
    lines += cells(setting, measured(setting, options, log))
    about: Any = {"machine": harness.machine(), "packages": PACKAGES}
    result = tables.write(path, COLUMNS, lines, **about)
  print(tables.table(result))
  return 0


if __name__ == "__main__":
  sys.exit(main())
