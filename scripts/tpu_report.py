"""What the TPU compiler expects of decoding: cycles by exit layer, memory, collectives.

Compiled for the TPU that is named, estimated by its compiler: nothing runs, none is needed.

  pip install '.[train,tpu]'   (x86 Linux)
  python scripts/tpu_report.py     scripts/results/tpu.json
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two compilations at once would wait for one lock; the others silence a search for a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import tables
import tpu_hlo
from jax.experimental import topologies

from calm import exits
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


# What the table shows: topology, dtype, rows, tokens decoded, programs. `compacted` lays caches
# out anew at 128 rows, and takes minutes to compile.
THREE = ("static", "eager", "deferred")
TABLE = (
  ("v3:2x2", "bfloat16", 1, 64, ("static", "deferred")),
  ("v3:2x2", "float32", 1, 64, THREE),
  ("v3:2x2", "float32", 8, 64, (*THREE, "compacted")),
  ("v3:2x2", "float32", 8, 512, ("static", "deferred")),
  ("v3:2x2", "float32", 32, 64, (*THREE, "compacted")),
  ("v3:2x2", "float32", 128, 64, THREE),
  ("v5e:2x2", "float32", 1, 64, ("static", "deferred")),
)
EXITS = (1, 2, 4, 8)
INPUT = 128  # tokens of a prompt
COLUMNS = (
  *("TPU, model", "B, length", "program", *(f"exit at {k}" for k in EXITS)),
  *("temporaries, MB", "caches, MB", "moves"),
)


def rows(topology: str, dtype: str, batch: int, length: int, programs: Sequence[str]) -> list:
  """Rows of the table: thousands of cycles by exit layer, in brackets the ratio to static."""
  config, sizes, static, made = configuration("small", dtype), (batch, INPUT, length), {}, []
  for name in programs:
    one, cells = None, []
    for layer in EXITS:
      if one is None or name == "static":
        one = compiled(topology, config, name, layer, sizes)
      segments = 1 if name == "static" else layer
      cycles = tpu_hlo.step_cycles(one.module, PATHS[name], segments) / 1e3
      if name == "static":
        static[layer] = cycles
      cells.append(f"{cycles:.0f}" + (f" ({cycles / static[layer]:.2f})" * (name != "static")))
    assert one is not None
    memory = [f"{one.temporaries / 1e6:.0f}", f"{one.caches / 1e6:.0f}"]
    moves = len(tpu_hlo.moved(one.module, one.half_cache))
    where = f"{topology.split(':')[0]}, small {dtype}"
    made.append([where, f"{batch}, {length}", name, *cells, *memory, moves])
    print(*made[-1], sep=" | ", flush=True)
  return made


def write(path: pathlib.Path, columns: Sequence[str], rows: Sequence[Any], left: int) -> None:
  """Writes a table whose first `left` columns are words."""
  align = ["left"] * left + ["right"] * (len(columns) - left)
  machine = "compiled for the TPU, estimated by its compiler: nothing was run"
  packages = ("jax", "jaxlib", "libtpu")
  tables.write(path, columns, rows, align=align, machine=machine, packages=packages)


def refuse_elsewhere() -> None:
  """SystemExit where nothing can be compiled for a TPU."""
  if reason := available():
    raise SystemExit(
      f"Expected a machine that can compile for a TPU, got another ({reason}); take x86"
      " Linux with the compiler."
    )


def main() -> None:
  """Compiles the programs of the table, and writes it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
  output = parser.parse_args().output
  refuse_elsewhere()
  made = []
  for case in TABLE:
    made += rows(*case)
    write(output, COLUMNS, made, left=3)


if __name__ == "__main__":
  main()
