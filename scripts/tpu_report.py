"""What the TPU compiler expects of decoding: cycles by exit layer, memory, collectives.

Compiled for the TPU that is named, estimated by its compiler: nothing runs, none is needed.

  pip install '.[train,tpu]'   (x86 Linux)
  python scripts/tpu_report.py --topology=v3:2x2 --sizes=8x64,32x64     a table of your own
  python scripts/tpu_report.py --table                                  scripts/results/tpu.json

Of the programs that a command names, those that its output holds already are kept; that of
`--table` is shown by scripts/tables.py.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two compilations at once would wait for one lock; the others silence a search for a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import tpu_hlo
from jax.experimental import topologies

from calm import exits, storage
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence, propagation
from calm.t5 import network, platforms

OUTPUT = pathlib.Path(__file__).parent / "results" / "tpu.json"
GATED = {"mlp_activations": ("gelu", "linear"), "one_hot_embedding": False}
# (embedding, heads, layers of either stack, feed-forward) of T5 1.1.
SIZES = {
  "small": (512, 6, 8, 1024),
  "base": (768, 12, 12, 2048),
  "large": (1024, 16, 24, 2816),
  "xl": (2048, 32, 24, 5120),
}
PATHS = {
  "static": tpu_hlo.Path(),
  "eager": tpu_hlo.Path(deeper=0, leaves=1),
  "deferred": tpu_hlo.Path(by_loops=True),
  "compacted": tpu_hlo.Path(deeper=-1, leaves=0, first_too=True),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program of the decode loop, compiled.

  Attributes:
    module: what was compiled.
    temporaries: bytes beside arguments and results, as laid out.
    caches: bytes of the self-attention caches, as counted from their shape.
    half_cache: numbers in half of one layer's cache.
  """

  module: tpu_hlo.Module
  temporaries: int
  caches: int
  half_cache: int


def available() -> str:
  """Why nothing can be compiled for a TPU here, or '' where it can."""
  if sys.platform != "linux" or platform.machine() != "x86_64":
    return f"libtpu is made for x86 Linux, this is {platform.machine()} {sys.platform}"
  try:
    importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return "libtpu is missing: pip install '.[tpu]'"
  return ""


def configuration(shape: str, dtype: str = "float32", **changes: Any) -> network.T5Config:
  """T5 1.1 of a size."""
  emb_dim, heads, layers, mlp_dim = SIZES[shape]
  sizes = {"num_encoder_layers": layers, "num_decoder_layers": layers, "num_heads": heads}
  sizes |= {"emb_dim": emb_dim, "mlp_dim": mlp_dim, "vocab_size": 32128, "dtype": dtype}
  return network.T5Config(**{**GATED, **sizes, **changes})


def lowered(
  config: network.T5Config,
  program: program_lib.Program,
  rows: int,
  length: int,
  weights_dtype: str | None = None,
):
  """(weights, encoded, active, threshold) as shapes, for prompts of `length` tokens."""
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

  def weights(tokens):
    made = network.Transformer(config).init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
    return program_lib.model_weights(made["params"], config, weights_dtype=weights_dtype)

  weights = jax.eval_shape(weights, tokens)
  encoded = jax.eval_shape(program.encode, weights, tokens)
  active = jax.ShapeDtypeStruct((rows,), jnp.bool_)
  return weights, encoded, active, jax.ShapeDtypeStruct((), jnp.float32)


def compiled(
  topology: str,
  config: network.T5Config,
  name: str,
  layer: int | None,
  sizes: Sequence[int],
  measure: confidence.Measure | None = None,
  allowed: tuple[int, ...] | None = None,
  weights_dtype: str | None = None,
  propagated: propagation.Propagation | None = None,
) -> Compiled:
  """The decode loop compiled for one core of a topology.

  Args:
    topology: 'v3:2x2', 'v5e:2x2', ...
    config: the model's sizes.
    name: 'static' or an engine's.
    layer: of a static program.
    sizes: (rows, tokens of a prompt, tokens decoded).
    measure: None is the classifier.
    allowed: layers after which a token may leave; None: all.
    weights_dtype: what weights are stored in, as `inference.load` has it.
    propagated: what skipped layers store; None is the exit state.
  """
  rows, input_length, length = sizes
  static = name == "static"
  dynamic = exits.DynamicExits(
    measure or confidence.Classifier(),
    allowed=allowed,
    propagation=propagated or propagation.ExitState(),
  )
  rule = exits.StaticExit(layer) if static else dynamic
  engine = engines.Eager() if static else engines.by_name(name)
  program = program_lib.Program(config, rule, length, engine=engine)
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  there = jax.sharding.SingleDeviceSharding(device)
  with platforms.laid_out_for("tpu"):
    leaves, tree = jax.tree.flatten(lowered(config, program, rows, input_length, weights_dtype))
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in leaves]
    run = lambda leaves: program.decode(*jax.tree.unflatten(tree, leaves))
    made = jax.jit(run).lower(leaves).compile()
  half = rows * length * config.num_heads * config.head_dim
  width = jnp.dtype(config.dtype).itemsize
  caches = 2 * half * width * rule.depth(config.num_decoder_layers)
  memory = made.memory_analysis()
  if memory is None:
    raise RuntimeError(
      "Expected the compiler to tell what memory it needs, got nothing; take another version."
    )
  return Compiled(tpu_hlo.parse(made.as_text() or ""), memory.temp_size_in_bytes, caches, half)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One program, one row of the table.

  Attributes:
    topology, shape, dtype: where and what.
    batch, input, length: rows, tokens of a prompt, tokens decoded.
    program: 'static' or an engine's name.
    kilocycles: of one token by exit layer (as text: JSON's keys are).
    temporaries_mb, caches_mb: of the deepest exit.
    moved: instructions of its token loop that only move half a layer's keys or more.
    collectives: of its token loop.
  """

  topology: str
  shape: str
  dtype: str
  batch: int
  input: int
  length: int
  program: str
  kilocycles: Mapping[str, float] = dataclasses.field(default_factory=dict)
  temporaries_mb: float = 0.0
  caches_mb: float = 0.0
  moved: int = 0
  collectives: int = 0

  @property
  def place(self) -> tuple[Any, ...]:
    """What programs that are compared have in common."""
    return self.topology, self.shape, self.dtype, self.batch, self.input, self.length

  def made(self, layers: Sequence[int]) -> "Estimate":
    """With the figures of these exit layers, ascending: compiles, once a static depth."""
    config, sizes = configuration(self.shape, self.dtype), (self.batch, self.input, self.length)
    one, cycles = None, {}
    for layer in layers:
      if one is None or self.program == "static":
        one = compiled(self.topology, config, self.program, layer, sizes)
      segments = 1 if self.program == "static" else layer
      total = tpu_hlo.step_cycles(one.module, PATHS[self.program], segments)
      cycles[str(layer)] = total / 1e3
    assert one is not None, "no exit layer"
    return dataclasses.replace(
      self,
      kilocycles=cycles,
      temporaries_mb=one.temporaries / 1e6,
      caches_mb=one.caches / 1e6,
      moved=len(tpu_hlo.moved(one.module, one.half_cache)),
      collectives=sum(tpu_hlo.collectives(one.module).values()),
    )


def cases(
  topology: str,
  dtype: str,
  sizes: str,
  programs: str,
  shape: str = "small",
  input_length: int = 128,
) -> list[Estimate]:
  """Programs without their figures, from words as the command line has them."""
  made = []
  for size in sizes.split(","):
    batch, length = map(int, size.split("x"))
    where = topology, shape, dtype, batch, input_length, length
    made += [Estimate(*where, name) for name in programs.split(",")]
  return made


# What the table shows. `compacted` lays caches out anew at 128 rows, and takes minutes to
# compile.
TABLE = (
  *cases("v3:2x2", "bfloat16", "1x64", "static,deferred"),
  *cases("v3:2x2", "float32", "1x64,128x64", "static,eager,deferred"),
  *cases("v3:2x2", "float32", "8x512", "static,deferred"),
  *cases("v3:2x2", "float32", "8x64,32x64", "static,eager,deferred,compacted"),
  *cases("v5e:2x2", "float32", "1x64", "static,deferred"),
)


def versions() -> dict[str, str]:
  """Of what decides the figures."""
  return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def stored(path: pathlib.Path | None) -> list[Estimate]:
  """What an earlier run of the same versions wrote.

  Raises:
    ValueError: the versions are others.
  """
  if path is None or not path.exists():
    return []
  value = json.loads(path.read_text("utf-8"))
  if value["versions"] != versions():
    raise ValueError(
      f"Expected {path} to be made with {versions()}, got {value['versions']}; name another"
      " `--output`, or delete it."
    )
  return [Estimate(**one) for one in value["programs"]]


def table(estimates: Sequence[Estimate]) -> dict[str, Any]:
  """Columns and rows: thousands of cycles by exit layer, in brackets the ratio to static."""
  layers = sorted({int(layer) for one in estimates for layer in one.kilocycles})
  static = {one.place: one.kilocycles for one in estimates if one.program == "static"}
  first = ["TPU, model", "B, length", "program"]
  last = ["temporaries, MB", "caches, MB", "moves"]
  rows = []
  for one in estimates:
    beside = {} if one.program == "static" else static.get(one.place, {})
    cells = [_cell(one.kilocycles.get(str(k)), beside.get(str(k))) for k in layers]
    where = f"{one.topology.split(':')[0]}, {one.shape} {one.dtype}"
    memory = [f"{one.temporaries_mb:.0f}", f"{one.caches_mb:.0f}", one.moved]
    rows.append([where, f"{one.batch}, {one.length}", one.program, *cells, *memory])
  columns = [*first, *(f"exit at {k}" for k in layers), *last]
  align = ["left"] * len(first) + ["right"] * (len(layers) + len(last))
  return {"columns": columns, "rows": rows, "align": align}


def _cell(cycles: float | None, static: float | None) -> str | None:
  if cycles is None:
    return None
  return f"{cycles:.0f}" + (f" ({cycles / static:.2f})" if static else "")


def write(path: pathlib.Path, command: str, estimates: Sequence[Estimate]) -> None:
  """Writes the table with what it was made from."""
  order = sorted(estimates, key=lambda one: (*one.place, list(PATHS).index(one.program)))
  value = {
    "command": command,
    "versions": versions(),
    "machine": "compiled for the TPU, estimated by its compiler: nothing was run",
    **table(order),
    "programs": [dataclasses.asdict(one) for one in order],
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_atomically(path, json.dumps(value, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
  """Compiles what the command names, and writes the output."""
  numbers = lambda text: [int(part) for part in text.split(",")]
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--table", action="store_true", help="the programs of the table")
  parser.add_argument("--topology", default="v3:2x2")
  parser.add_argument("--shape", default="small", choices=SIZES)
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--sizes", default="1x64,8x64,32x64", help="rows x tokens decoded")
  parser.add_argument("--input_length", default=128, type=int)
  parser.add_argument("--exit_layers", default=[1, 2, 4, 8], type=numbers)
  parser.add_argument("--programs", default="static,deferred", help=", ".join(PATHS))
  parser.add_argument("--output", type=pathlib.Path, help="of --table: results/tpu.json")
  flags = parser.parse_args(arguments)
  output = flags.output or (OUTPUT if flags.table else None)
  if reason := available():
    raise SystemExit(
      f"Expected a machine that can compile for a TPU, got another ({reason}); take x86"
      " Linux with the compiler."
    )
  given = [part for part in arguments or sys.argv[1:] if not part.startswith("--output")]
  command = shlex.join(["python", "scripts/tpu_report.py", *given])
  words = flags.topology, flags.dtype, flags.sizes, flags.programs
  wanted = TABLE if flags.table else cases(*words, flags.shape, flags.input_length)
  held = {(one.place, one.program): one for one in stored(output)}
  made = []
  for one in wanted:
    known = held.get((one.place, one.program))
    made.append(known or one.made(flags.exit_layers))
    print(made[-1], flush=True)
    # What is still to come is kept meanwhile.
    later = [
      held[x.place, x.program] for x in wanted[len(made) :] if (x.place, x.program) in held
    ]
    if output:
      write(output, command, [*made, *later])


if __name__ == "__main__":
  main()
