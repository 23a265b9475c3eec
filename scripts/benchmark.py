"""How fast decoding is: one command, one table.

Full depth, static k, and dynamic exits of every measure with exits forced to known depths (so
that the depth is the same whatever the weights) and to a mixed trace; other people's decoders
on the same weights where they are installed. Every repeat runs every row once, so that drift
hits all alike; compilation is excluded and reported. The floor of a row is its weights and
caches (`calm.t5.costs`) at the speed at which memory was read in the same run.

  python scripts/benchmark.py --output=runs/benchmark
  python scripts/benchmark.py --shapes=small --batch_sizes=1 --measures=classifier --peers=
  python scripts/benchmark.py --shapes=packed --thresholds=0.95,0.9 --batch_sizes=1,8
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
import warnings
from importlib import metadata
from typing import Any

import benchmark_models as models
import benchmark_peers as peers
import benchmark_systems as systems
import benchmark_table as table
import jax
import numpy as np

from calm import exits, storage
from calm.decode import sharded
from calm.t5 import costs

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "llvmlite",
  "torch",
  "transformers",
  "ctranslate2",
)


@dataclasses.dataclass
class Times:
  """What was measured of one system.

  Attributes:
    system: the row.
    decoded: its outputs, checked.
    first: seconds of the first run, which compiles.
    decode, encode: seconds of each repeat; `encode` is empty where it is not timed.
  """

  system: systems.System
  decoded: systems.Decoded
  first: float
  decode: list[float] = dataclasses.field(default_factory=list)
  encode: list[float] = dataclasses.field(default_factory=list)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  words = lambda text: tuple(part for part in text.split(",") if part)
  ints = lambda text: tuple(int(part) for part in words(text))
  floats = lambda text: tuple(float(part) for part in words(text))
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--shapes", type=words, default=("small", "base", "packed"), help=str(models.SHAPES))
  add("--batch_sizes", type=ints, default=(1, 8, 32))
  add("--input_lengths", type=ints, default=(128, 512))
  add("--decode_lengths", type=ints, default=(64, 512))
  add("--depths", type=ints, default=(1, 2, 4), help="static and forced exits")
  add(
    "--measures", type=words, default=("classifier", "probe", "state", "shortlist", "softmax")
  )
  add("--engines", type=words, default=tuple(systems.ENGINES), help="ways of running the loop")
  add("--readings", type=words, default=("int8",), help=f"ours too: {dict(models.READINGS)}")
  add("--num_devices", type=int, default=1, help="ours also over so many CPU devices")
  add("--thresholds", type=floats, default=(), help="real exits too, at these thresholds")
  add("--systems", type=words, default=(), help="only rows that contain one of these words")
  add("--brief", type=words, default=(), help="the same, where a length is not the least")
  add("--exit_layers", type=ints, default=None, help="where --thresholds may leave; all")
  add("--peers", type=words, default=tuple(peer.name for peer in peers.PEERS))
  add("--against", help="also how many times as long the first row with these words takes")
  add("--repeats", type=int, default=7)
  add("--num_prompts", type=int, default=16, help="prompts of the packed model")
  add("--shortlist", type=int, default=512, help="tokens on a random model's shortlist")
  add("--dtype", default="float32", help="ours and T5X's: float32 or bfloat16")
  add("--output", help="writes OUTPUT.json and OUTPUT.md after every setting")
  add("--results", help="writes scripts/results/RESULTS.json at the end, for scripts/tables.py")
  parsed = parser.parse_args(arguments)
  unknown = set(parsed.shapes) - set(models.SHAPES) | set(parsed.readings) - set(
    models.READINGS
  )
  if unknown or parsed.repeats < 1:
    parser.error(
      f"Expected shapes among {models.SHAPES}, readings among {tuple(models.READINGS)} and a"
      f" repeat or more, got {unknown}."
    )
  return parsed


def machine() -> dict[str, Any]:
  """What it ran on."""
  name = platform.processor() or platform.machine()
  cpu = pathlib.Path("/proc/cpuinfo")
  if cpu.exists():
    models_ = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
    name = models_[0].partition(":")[2].strip() if models_ else name
  device = jax.devices()[0]
  return {
    "cpu": name,
    "cores": len(os.sched_getaffinity(0)),
    "device": f"{device.platform}: {device.device_kind}",
    "load_before": os.getloadavg()[0],
    "python": platform.python_version(),
    "versions": {p: _version(p) for p in PACKAGES if _version(p)},
    # Shown to readers: the script's name and what it was given, and not where it lay.
    "command": shlex.join(
      ["python", f"scripts/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]
    ),
  }


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def rows_of(setting: models.Setting, options: argparse.Namespace, log) -> list[table.Row]:
  """Times everything that is asked for in one setting."""
  model = models.load(setting.shape, options.dtype, options.shortlist)
  ours = systems.Ours(model, setting)
  thresholds = options.thresholds if setting.shape == "packed" else ()
  everything = ours.systems(
    options.depths, options.measures, thresholds, options.engines, options.exit_layers
  )
  for others, words in variants(model, setting, options):
    made = others.systems((), options.measures, thresholds, ("default",), options.exit_layers)
    encode = others.encode if encodes_otherwise(words) else None
    everything += [systems.renamed(system, words, encode) for system in made]
  for peer in peers.PEERS:
    if peer.name in options.peers and not peers.not_installed(*peer.packages):
      everything += peer.systems(model, setting, options.depths)
  words = chosen_words(setting, options)
  wanted = [
    system
    for i, system in enumerate(everything)
    if i == 0 or not words or any(word in system.name for word in words)
  ]
  times = [_first_run(system, log) for system in wanted]
  step_bytes = _step_bytes(ours)
  memory = systems.Memory(max(int(step_bytes), 1 << 26))
  speeds = []
  for repeat in range(options.repeats):
    log(f"  repeat {repeat + 1} of {options.repeats}")
    speeds.append(memory.bytes_per_second())
    turn = repeat % len(times)
    for time_ in times[turn:] + times[:turn]:
      _run(time_)
  rows = _table(setting, model, times, max(speeds))
  rival = next((t for t in times if options.against and options.against in t.system.name), None)
  if options.against and rival is None:
    log(f"  no row has {options.against!r} in its name")
  for row, time_ in zip(rows, times, strict=True):
    if rival is not None:
      row.against = table.ratio(_per_step(rival, model), _per_step(time_, model))
      both = (_whole(each, model, times[0]) for each in (rival, time_))
      row.against_whole = table.ratio(*both)
  return rows


def variants(
  model: models.Model, setting: models.Setting, options: argparse.Namespace
) -> list[tuple[systems.Ours, str]]:
  """Ours with weights read otherwise, over several devices, and both; with what to call it."""
  weights = models.read(model, options.readings)
  counts = {"": 1}
  if options.num_devices > 1 and setting.batch_size % options.num_devices == 0:
    counts[f"{options.num_devices} devices"] = options.num_devices
  return [
    (
      systems.Ours(weights[way], setting, counts[spread], way != models.READINGS["xla"]),
      ", ".join(filter(None, both)),
    )
    for both in itertools.product(weights, counts)
    if any(both)
    for way, spread in [both]
  ]


def encodes_otherwise(words: str) -> bool:
  """Whether a variant that is called so has an encoder of its own."""
  return any(models.READINGS[name] in words for name in models.ENCODES)


def chosen_words(setting: models.Setting, options: argparse.Namespace) -> tuple[str, ...]:
  """What the rows of a setting contain one of; () for all rows."""
  least = min(options.input_lengths), min(options.decode_lengths)
  if options.brief and (setting.input_length, setting.decode_length) != least:
    return options.brief
  return options.systems


def _step_bytes(ours: systems.Ours) -> float:
  pieces = ours.system("", exits.StaticExit(), None).pieces
  assert pieces is not None
  return pieces.full.weight_bytes


def _first_run(system: systems.System, log) -> Times:
  log(f"  compile {system.name}")
  start = time.perf_counter()
  decoded = system.decode()
  first = time.perf_counter() - start
  if system.exact is not None:
    assert decoded.exit_layers is not None
    for got, expected in zip(decoded.exit_layers, system.exact, strict=True):
      np.testing.assert_array_equal(got, expected, err_msg=f"exits of {system.name}")
  if system.encode is not None:
    system.encode()
  return Times(system, decoded, first)


def _run(times: Times) -> None:
  start = time.perf_counter()
  times.system.decode()
  middle = time.perf_counter()
  times.decode.append(middle - start)
  if times.system.encode is not None:
    times.system.encode()
    times.encode.append(time.perf_counter() - middle)


def _table(setting, model: models.Model, times: list[Times], speed: float) -> list[table.Row]:
  """Seconds as milliseconds a step, beside the static models and the floor."""
  full = times[0]
  rows = [_row(setting, model, t, full, speed) for t in times]
  static = {
    t.system.measured_layers: row.median
    for t, row in zip(times, rows, strict=True)
    if t.system.pieces is not None and t.system.measured_layers is not None
  }
  depths = sorted(static)
  for row in rows:
    row.over_full = row.median / rows[0].median
    within = row.layers is not None and depths[0] <= row.layers <= depths[-1]
    if not row.peer and within and len(depths) > 1:
      at = np.interp(row.layers or 0.0, depths, [static[depth] for depth in depths])
      row.over_static = row.median / float(at)
  return rows


def _row(setting, model: models.Model, times: Times, full: Times, speed: float) -> table.Row:
  system, decoded = times.system, times.decoded
  decode, steps = _per_step(times, model), _steps(decoded, model)
  layers = system.measured_layers
  if layers is None and decoded.exit_layers is not None:
    taken = np.concatenate([e.ravel() for e in decoded.exit_layers])
    layers = float(taken[taken > 0].mean())
  megaflops = megabytes = floor = None
  if system.pieces is not None and decoded.exit_layers is not None:
    moved = sum(costs.batch_bytes(system.pieces, e) for e in decoded.exit_layers)
    megabytes, floor = moved / steps / 1e6, 1e3 * moved / speed / steps
    total = costs.totals(system.pieces, decoded.exit_layers)
    megaflops = total.early.flops / total.tokens / 1e6
  comparable = layers == full.system.measured_layers
  return table.Row(
    setting=str(setting),
    system=system.name,
    peer=system.peer,
    layers=layers,
    median=statistics.median(decode),
    low=min(decode),
    high=max(decode),
    end_to_end=statistics.median(_whole(times, model, full)),
    compile_seconds=max(times.first - statistics.median(times.decode), 0.0),
    megaflops=megaflops,
    megabytes=megabytes,
    floor=floor,
    gigabytes_per_second=speed / 1e9,
    agreement=agreement(decoded, full.decoded, model.eos_id) if comparable else None,
  )


def _steps(decoded: systems.Decoded, model: models.Model) -> int:
  """Steps of the decoder over all batches."""
  return sum(int(lengths(tokens, model.eos_id).max()) for tokens in decoded.tokens)


def _per_step(times: Times, model: models.Model) -> list[float]:
  """Milliseconds a step of every repeat, encoder excluded."""
  steps = _steps(times.decoded, model)
  if not times.system.by_difference:
    return [1e3 * seconds / steps for seconds in times.decode]
  steps = max(steps - len(times.decoded.tokens), 1)
  pairs = zip(times.decode, times.encode, strict=True)
  return [1e3 * (both - encoder) / steps for both, encoder in pairs]


def _whole(times: Times, model: models.Model, full: Times) -> list[float]:
  """Milliseconds a step of every repeat with the encoder, full depth's where it has none."""
  steps = _steps(times.decoded, model)
  if times.system.by_difference:
    return [1e3 * seconds / steps for seconds in times.decode]
  pairs = zip(times.decode, times.encode or full.encode, strict=True)
  return [1e3 * (decoder + encoder) / steps for decoder, encoder in pairs]


def lengths(tokens: np.ndarray, eos_id: int) -> np.ndarray:
  """Tokens of each row, EOS included, [batch]."""
  tokens = np.asarray(tokens)
  ended = tokens == eos_id
  return np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1])


def agreement(got: systems.Decoded, full: systems.Decoded, eos_id: int) -> float:
  """Share of the full depth's tokens that the other decoder has at the same place."""
  equal = count = 0
  for ours, theirs in zip(full.tokens, got.tokens, strict=True):
    real = np.arange(ours.shape[1]) < lengths(ours, eos_id)[:, None]
    equal += int((np.asarray(ours) == np.asarray(theirs))[real].sum())
    count += int(real.sum())
  return equal / count


def output_of(options: argparse.Namespace) -> pathlib.Path | None:
  """Where what is done so far is written: no whole table of results is replaced by a part."""
  if options.output:
    return pathlib.Path(options.output)
  return pathlib.Path("runs", f"benchmark_{options.results}") if options.results else None


def main(arguments: list[str] | None = None) -> int:
  """Runs the whole table; what is done is written after every setting."""
  options = parse(arguments)
  if (path := output_of(options)) is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
  sharded.make_cpu_devices(options.num_devices)
  # Compilation is reported: it must not come from disk.
  warnings.filterwarnings("ignore")  # peers' own
  jax.config.update("jax_enable_compilation_cache", False)
  log = lambda text: print(text, file=sys.stderr, flush=True)
  about = machine()
  wanted = [peer for peer in peers.PEERS if peer.name in options.peers]
  missing = {peer.name: peers.not_installed(*peer.packages) for peer in wanted}
  about["not_installed"] = [f"{name} ({why})" for name, why in missing.items() if why]
  about["against"] = options.against
  rows: list[table.Row] = []
  settings = models.grid(
    options.shapes,
    options.batch_sizes,
    options.input_lengths,
    options.decode_lengths,
    options.num_prompts,
  )
  for number, setting in enumerate(settings, start=1):
    log(f"{setting} ({number} of {len(settings)})")
    rows += rows_of(setting, options, log)
    if path is not None:
      stored = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
      storage.write_atomically(path.with_suffix(".json"), json.dumps(stored, indent=1) + "\n")
      storage.write_atomically(path.with_suffix(".md"), table.markdown(rows, about))
  print(table.markdown(rows, about))
  if options.results:
    path = pathlib.Path(__file__).parent / "results" / f"{options.results}.json"
    storage.write_atomically(path, json.dumps(table.result(rows, about), indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
