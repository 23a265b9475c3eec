"""A generation in one array, for its way back to the host: every array that comes back takes a
short text of a small model some microseconds longer."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from calm.decode import loop


def packed(made: loop.Generation) -> Int[Array, "batch columns"]:
  """Its arrays beside each other, float32 by their bits."""
  parts = [_bits(leaf.reshape(len(leaf), -1)) for leaf in jax.tree.leaves(made)]
  return jnp.concatenate(parts, axis=1)


def _bits(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.float32:
    return lax.bitcast_convert_type(x, jnp.int32)
  return x.astype(jnp.int32)


def unpacked(array: np.ndarray, length: int) -> loop.Generation:
  """The generation again, of numpy arrays.

  Args:
    array: of `packed`, on the host.
    length: most tokens of a row.
  """
  ints, floats = array, array.view(np.float32)
  tokens, layers, sure, refused = (slice(i * length, (i + 1) * length) for i in range(4))
  rest = 4 * length
  verification = None
  if array.shape[1] > rest + 1:
    drafted, counts = slice(rest + 1, rest + 1 + length), rest + 1 + length
    verification = loop.Verification(
      ints[:, drafted] > 0, ints[:, counts : counts + 2], floats[:, counts + 2 :]
    )
  return loop.Generation(
    tokens=ints[:, tokens],
    exit_layers=ints[:, layers],
    confidences=floats[:, sure],
    rejected_confidences=floats[:, refused],
    scores=floats[:, rest],
    verification=verification,
  )
