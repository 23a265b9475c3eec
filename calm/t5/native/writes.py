"""Keys and values written to several caches in one call."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from calm.exits.layers import KeyValue
from calm.t5.caches import Cache
from calm.t5.native import calls


def write(
  caches: Sequence[Cache], windows: Sequence[KeyValue], positions: Int[Array, " batch_or_one"]
) -> tuple[Cache, ...]:
  """Writes every row's window at its own position, in place.

  Args:
    caches: of some layers that `takes` allows, with room for the window.
    windows: keys and values of each, [batch, heads, window, head_dim].
    positions: of each row's window, or of all of them.
  """
  before, tree = jax.tree.flatten(tuple(caches))
  new = [x for window in windows for x in (window.key, window.value)]
  count, size = len(new), new[0].shape[2]
  if size == 1:  # as attention is given them: another shape would be made beside it
    new = [x[:, :, 0] for x in new]
  made = jax.ffi.ffi_call(
    _target(count, size),
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in before],
    input_output_aliases={1 + count + i: i for i in range(count)},
  )(positions, *(x.astype(jnp.float32) for x in new), *before)
  return jax.tree.unflatten(tree, made)


def _target(count: int, window: int) -> str:
  """What XLA calls the function, compiled when first asked for."""
  from calm.t5.native import writes_kernel  # takes llvmlite

  make = lambda: writes_kernel.writes(count, window)
  return calls.target(f"calm_writes_{count}_{window}", make)
