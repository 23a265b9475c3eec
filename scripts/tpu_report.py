"""What the TPU compiler expects of decoding: cycles by exit layer, memory,
collectives.

Compiled for the TPU that is named, estimated by its compiler: nothing runs,
none is needed.

  pip install '.[train,tpu]'   (x86 Linux)
  python scripts/tpu_report.py     scripts/results/tpu.json
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two compilations at once would wait for one lock; the others silence a search
# for a TPU.
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
  """One program of the decode loop, compiled."""

  module: tpu_hlo.Module
  temporaries: int  # bytes beside arguments and results, as laid out
  caches: int  # bytes of the self-attention caches, as counted from their shape
  half_cache: int  # numbers in half of one layer's cache


def available() -> str:
  """Why nothing can be compiled for a TPU here, or '' where it can."""
  missing = importlib.util.find_spec("libtpu") is None
  return (
    "libtpu is missing: pip install '.[tpu]' on x86 Linux" if missing else ""
  )


def configuration(
  shape: str, dtype: str = "float32", **changes: Any
) -> network.T5Config:
  """T5 1.1 of a size."""
  emb_dim, heads, layers, mlp_dim = SIZES[shape]
  sizes = {
    "num_encoder_layers": layers,
    "num_decoder_layers": layers,
    "num_heads": heads,
  }
  sizes |= {
    "emb_dim": emb_dim,
    "mlp_dim": mlp_dim,
    "vocab_size": 32128,
    "dtype": dtype,
  }
  return network.T5Config(**{**GATED, **sizes, **changes})


def compiled(
  topology: str,
  config: network.T5Config,
  name: str,
  layer: int | None,
  sizes: Sequence[int],
  weights_dtype: str | None = None,
  propagated: propagation.Propagation | None = None,
) -> Compiled:
  """The decode loop compiled for one core of a topology, with the classifier as
  measure.

  Args:
    topology: 'v3:2x2', 'v5e:2x2', ...
    config: the model's sizes.
    name: 'static' or an engine's.
    layer: of a static program.
    sizes: (rows, tokens of a prompt, tokens decoded).
    weights_dtype: what weights are stored in, as `inference.load` has it.
    propagated: what skipped layers store; None is the exit state.
  """
  rows, input_length, length = sizes
  rule = exits.StaticExit(layer)
  engine = engines.Eager
  if name != "static":
    propagated = propagated or propagation.ExitState()
    rule = exits.DynamicExits(confidence.Classifier(), propagation=propagated)
    engine = getattr(engines, name.title())
  program = program_lib.Program(config, rule, length, engine=engine)

  def laid_out(params, tokens, active, threshold):
    weights = program_lib.model_weights(
      params, config, weights_dtype=weights_dtype
    )
    return weights, program.encode(weights, tokens), active, threshold

  init = functools.partial(
    network.Transformer(config).init, enable_dropout=False
  )

  def shape(dtype, *dims):
    return jax.ShapeDtypeStruct(dims, dtype)

  tokens = shape(jnp.int32, rows, input_length)
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices[0]
  there = jax.sharding.SingleDeviceSharding(device)
  with platforms.laid_out_for("tpu"):
    params = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)[
      "params"
    ]
    given = (params, tokens, shape(jnp.bool_, rows), shape(jnp.float32))
    leaves, tree = jax.tree.flatten(jax.eval_shape(laid_out, *given))
    leaves = [
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in leaves
    ]

    def run(leaves):
      return program.decode(*jax.tree.unflatten(tree, leaves))

    made = jax.jit(run).lower(leaves).compile()
  half = rows * length * config.num_heads * config.head_dim
  width = jnp.dtype(config.dtype).itemsize
  caches = 2 * half * width * rule.depth(config.num_decoder_layers)
  memory: Any = made.memory_analysis()
  return Compiled(
    tpu_hlo.parse(made.as_text() or ""), memory.temp_size_in_bytes, caches, half
  )


# What the table shows: topology, dtype, rows, tokens decoded, programs.
# `compacted` lays caches out anew at 128 rows, and takes minutes to compile.
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


def rows(
  topology: str, dtype: str, batch: int, length: int, programs: Sequence[str]
) -> list:
  """Rows of the table: thousands of cycles by exit layer, in brackets the ratio
  to static.
  """
  config = configuration("small", dtype)
  sizes = (batch, INPUT, length)
  static = {}
  made = []
  for name in programs:
    one = None
    cells = []
    for layer in EXITS:
      if one is None or name == "static":
        one = compiled(topology, config, name, layer, sizes)
      segments = 1 if name == "static" else layer
      cycles = tpu_hlo.step_cycles(one.module, PATHS[name], segments) / 1e3
      if name == "static":
        static[layer] = cycles
      cells.append(
        f"{cycles:.0f}"
        + (f" ({cycles / static[layer]:.2f})" * (name != "static"))
      )
    assert one is not None
    memory = [f"{one.temporaries / 1e6:.0f}", f"{one.caches / 1e6:.0f}"]
    moves = len(tpu_hlo.moved(one.module, one.half_cache))
    where = f"{topology.split(':')[0]}, small {dtype}"
    made.append([where, f"{batch}, {length}", name, *cells, *memory, moves])
    print(*made[-1], sep=" | ", flush=True)
  return made


def write(
  path: pathlib.Path, columns: Sequence[str], rows: Sequence[Any]
) -> None:
  """Writes a table whose first three columns are words."""
  align = ["left"] * 3 + ["right"] * (len(columns) - 3)
  machine = "compiled for the TPU, estimated by its compiler: nothing was run"
  packages = ("jax", "jaxlib", "libtpu")
  tables.write(
    path, columns, rows, align=align, machine=machine, packages=packages
  )


def flags_of(
  about: str | None, output: pathlib.Path, **options: Any
) -> argparse.Namespace:
  """Options of the command line; SystemExit where nothing can be compiled for a
  TPU.
  """
  shape = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=about, formatter_class=shape)
  parser.add_argument("--output", type=pathlib.Path, default=output)
  for name, kind in options.items():
    parser.add_argument(f"--{name}", **kind)
  flags = parser.parse_args()
  if reason := available():
    raise SystemExit(f"Expected a machine that compiles for a TPU: {reason}.")
  return flags


def main() -> None:
  """Compiles the programs of the table, and writes it."""
  flags = flags_of(__doc__, OUTPUT)
  made = []
  for case in TABLE:
    made += rows(*case)
    write(flags.output, COLUMNS, made)


if __name__ == "__main__":
  main()
