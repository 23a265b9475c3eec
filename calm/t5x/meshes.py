"""Decode loops under `shard_map` over a mesh: every device decodes rows of its own.

In T5X's partitioned step a conditional is one decision of the whole mesh: every device would
run as deep and as long as the deepest row. Here each device ends its own loop, with the
decoder's weights whole; nothing is exchanged until all have ended. Weights along the model axis
are gathered once a batch, and rows are split along that axis too: loops of different lengths
with collectives inside would wait for each other for ever. This module does not import T5X.
"""

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.linen import partitioning
from jax import sharding

from calm.decode import engines
from calm.t5 import parameters
from calm.t5.network import Params

# The axes that T5X's partitioner lays batches along; 'replica' where there are several slices.
DATA_AXES = ("replica", "data")

MODEL_AXIS = "model"
# Logical axes that T5X's rules lay along it.
_ALONG_MODEL = ("vocab", "heads", "joined_kv", "mlp")
# Parts of the parameters that decode loops read.
READ_IN_LOOPS = ("token_embedder", "decoder")
# Kernels whose first axis lies along the model axis under T5X's rules; the others' last does.
_SPLIT_BY_ROWS = ("out", "wo")
# Decoders larger than this are decoded across devices: half of a TPU v3 core's memory.
APART_BYTES = 8 * 2**30
# Decoders stored in more do not stay whole between batches: T5 1.1 large's do, XL's does not.
KEPT_BYTES = 2 * 2**30


def fits(weights: Any) -> bool:
  """Whether every device can hold these weights whole: in `APART_BYTES` at most."""
  sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
  return sum(sizes) <= APART_BYTES


def row_axes(mesh: Any, num_rows: Any) -> tuple[str, ...]:
  """The axes of a mesh along which rows are split: all, or its data axes, or none.

  The axes' sizes must divide `num_rows`; a symbolic number (`jax.export`) is never split.
  """
  every = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
  for axes in (every, tuple(name for name in every if name in DATA_AXES)):
    size = math.prod(mesh.shape[name] for name in axes)
    if axes and isinstance(num_rows, int) and num_rows % size == 0:
      return axes
  return ()


def may_stay_whole(params: Params) -> bool:
  """Whether every device can hold what loops read whole between batches too.

  Counted in float32, so that a model's first variables and its checkpoint have one answer.
  """
  sizes = (leaf.size for part in READ_IN_LOOPS for leaf in jax.tree.leaves(params[part]))
  return 4 * sum(sizes) <= KEPT_BYTES


def kept_whole(variables: Any) -> Any:
  """Variables of a model whose decoder every device is to keep whole.

  Args:
    variables: as T5X's models make them, with 'params_axes'.

  Returns:
    The same with axes of the decoder and the embedding renamed to "kv", which T5X's rules lay
    along no mesh axis, and which its Adafactor factors as those that it replaces. As they are
    where they may not stay whole.
  """
  if not may_stay_whole(variables["params"]):
    return variables
  rename = lambda axes: axes.replace(
    names=sharding.PartitionSpec(*("kv" if n in _ALONG_MODEL else n for n in axes.names))
  )
  is_axes = lambda x: isinstance(x, partitioning.AxisMetadata)
  axes = {
    part: jax.tree.map(rename, tree, is_leaf=is_axes) if part in READ_IN_LOOPS else tree
    for part, tree in variables["params_axes"].items()
  }
  return type(variables)({**variables, "params_axes": axes})


def whole(params: Params, mesh: Any, dtype: Any, at_rest: bool = False) -> Params:
  """The parameters, those that loops read whole on every device, as `over_rows` shares them.

  Kernels that T5X's rules split by columns ("joined_kv", "mlp" and "vocab" along the model
  axis) are gathered column block by column block. Left to itself the compiler gathers along
  the last axis: on a CPU it lays both the parts and the whole out anew, element by element.

  Args:
    params: T5X-shaped; elsewhere than along `MODEL_AXIS` the compiler gathers.
    mesh: the partitioner's.
    dtype: in which the layers' kernels are multiplied, and so exchanged.
    at_rest: whether they are whole already along the model axis (`kept_whole`).
  """
  count = 1 if at_rest else dict(mesh.shape).get(MODEL_AXIS, 1)
  if count > 1:
    logging.getLogger(__name__).warning(
      "Every batch gathers the decoder's weights, which lie along the model axis; for inference"
      " give the model `whole_decoder = True`, and they stay whole on every device."
    )
  put = lambda leaf, *spec: jax.lax.with_sharding_constraint(
    leaf, sharding.NamedSharding(mesh, sharding.PartitionSpec(*spec))
  )

  def gathered(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    block, kind = path[-2:]
    # Heads and what they read are in float32.
    if kind == "kernel" and path[-3:-2] not in (("decoder",), ("exit_translators",)):
      leaf = jnp.asarray(leaf, dtype)
    by_rows = (
      kind != "kernel"
      or block in _SPLIT_BY_ROWS
      or not {*parameters.EXIT_PARTS}.isdisjoint(path)
    )
    if count == 1 or by_rows or leaf.ndim != 2 or leaf.shape[1] % count:
      return put(leaf)
    parts = jnp.swapaxes(leaf.reshape(len(leaf), count, -1), 0, 1)
    return jnp.swapaxes(put(put(parts, MODEL_AXIS)), 0, 1).reshape(leaf.shape)

  read = {part: params[part] for part in READ_IN_LOOPS}
  return {**params, **traverse_util.path_aware_map(gathered, read)}


def over_rows(
  function: Callable[[Any, Any, Any], Any],
  mesh: Any,
  axes: tuple[str, ...],
  one_draw: bool = False,
) -> Callable[[Any, Any, Any], Any]:
  """`function`(shared, rows, rng), each device with its own rows.

  Args:
    function: `rows` and what it returns are trees of arrays [rows, ...]; `shared` is a tree of
      arrays that every device sees whole; `rng` is a key or None.
    mesh: the partitioner's.
    axes: from `row_axes`; devices along the others do the same.
    one_draw: whether `function` draws once for all rows, so that every device has to draw the
      same. T5X's sampling does so where every row has a temperature of its own.

  Returns:
    A function of the same arguments and results; `function` itself where there is nothing to
    split. Every device draws by a key of its own, and so otherwise than one device would.
  """
  if not axes:
    return function

  def local(shared, rows, rng):
    if rng is not None and not one_draw:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axes))
    return function(shared, rows, rng)

  whole, split = sharding.PartitionSpec(), sharding.PartitionSpec(axes)
  # Loops of different lengths on different devices are what this is for: nothing is checked to
  # vary alike.
  return jax.shard_map(
    local, mesh=mesh, in_specs=(whole, split, whole), out_specs=split, check_vma=False
  )


def engine_over(
  engine: engines.Engine | None, num_rows: Any, apart: bool
) -> engines.Engine | None:
  """The engine of a batch; None is the fastest for its rows.

  Only the plain engine takes a symbolic `num_rows`; it exchanges least where steps are the
  whole mesh's (not `apart`).

  Raises:
    ValueError: the one asked for does not take symbolic sizes.
  """
  symbolic = not isinstance(num_rows, int)
  if engine is None and (symbolic or not apart):
    return engines.Eager()
  if symbolic and not isinstance(engine, engines.Eager):
    raise ValueError(
      "Expected engines.Eager for a symbolic batch size, got"
      f" {type(engine).__name__}, which asks for it; leave `engine` out."
    )
  return engine


def with_rng(options: dict[str, Any], rng: jax.Array | None) -> dict[str, Any]:
  """`decoder_params` with the key of the call, as T5X takes it.

  Raises:
    ValueError: there are two keys, or an index to start from.
  """
  if options.get("initial_index") is not None:
    raise ValueError(
      "Expected decoding from the first position, got `decoder_params['initial_index']`, which"
      " wants a filled cache; give the prefix as targets, with `prompt_with_targets`."
    )
  if rng is None:
    return options
  if options.get("decode_rng") is not None:
    raise ValueError(
      "Expected one random key, got `rng` and `decoder_params['decode_rng']`; leave one out."
    )
  return {**options, "decode_rng": rng}


def key_of(options: dict[str, Any], decode_fn: Callable[..., Any]) -> Any:
  """The key of a decode function, T5X's default where it takes one; None where it does not."""
  given = options.get("decode_rng")
  if given is None and "decode_rng" in inspect.signature(decode_fn).parameters:
    return jax.random.PRNGKey(0)
  return given


def split_options(options: dict[str, Any], num_rows: Any) -> tuple[dict[str, Any], ...]:
  """Options of a decode function without its key, as (by row, traced, static).

  Those with an entry for every row are split as rows are, other traced ones go in as arguments,
  and static ones are part of the program.
  """
  by_row, traced, static = {}, {}, {}
  for name, value in options.items():
    if isinstance(value, jax.Array | np.ndarray) and value.shape[:1] == (num_rows,):
      kind = by_row
    else:
      kind = traced if isinstance(value, jax.Array) else static
    if name != "decode_rng":
      kind[name] = value
  return by_row, traced, static
