"""An output head that is read in 8 bits, and in float32 only where that decides.

A product with the whole head costs what reading its float32 matrix costs. Here every piece's
column is rounded to 8 bits first; a bound on what rounding can change says which pieces may be
the most likely one, and those are scored again in float32. Where more pieces are in question
than are scored again, the float32 head is asked whole. So the largest logit and its place are
those of the float32 head; of the others, which only a softmax's sum reads, most are rounded.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int8

# Pieces that are scored again, most.
CANDIDATES = 16
# 8-bit products have at least so many rows: XLA:CPU multiplies fewer number by number.
LEAST_ROWS = 8
# Codes lie in -127 ... 127; what the first code of a state leaves is coded again, finer.
_CODES, _FINER = 127.0, 254.0
# Of float32 sums, relative to the norms of what is multiplied.
_ROUNDING = 1e-5


@struct.dataclass
class QuantizedHead:
  """One output head.

  Attributes:
    rows: the head, transposed, in the dtype of the matrices.
    codes: its pieces in 8 bits.
    scales: what a piece's codes are multiplied with.
    slack: |logit - rounded logit| of a state x is at most |x| times this.
  """

  rows: Float[Array, "pieces emb"]
  codes: Int8[Array, "pieces emb"]
  scales: Float[Array, " pieces"]
  slack: Float[Array, " pieces"]

  def logits(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """float32 logits, the largest of each row that of the float32 head.

    Args:
      states: decoder_norm(d^i), float32.
    """
    rounded = self.rounded(states)
    if rounded.shape[1] <= CANDIDATES:
      return self.whole(states)
    norms = jnp.linalg.norm(states, axis=1, keepdims=True)
    # All of what `top_k` gives is used: XLA:CPU would sort the vocabulary to give a part of it.
    upper, places = lax.top_k(rounded + norms * self.slack[None, :], CANDIDATES)
    # Multiplied and summed: of a product XLA:CPU would transpose the whole head first.
    scored = jnp.sum(self.rows[places].astype(jnp.float32) * states[:, None], axis=-1)
    certain = jnp.all(jnp.max(scored, axis=1) > jnp.min(upper, axis=1))
    batch = jnp.arange(len(states))[:, None]
    return lax.cond(
      certain,
      lambda: rounded.at[batch, places].set(scored),
      lambda: self.whole(states),
    )

  def rounded(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """Logits of the 8-bit head."""
    count = len(states)
    largest = jnp.max(jnp.abs(states), axis=1, keepdims=True)
    step = jnp.maximum(largest, 1e-30) / _CODES
    coarse = jnp.round(states / step)
    fine = jnp.round((states / step - coarse) * _FINER)
    codes = jnp.concatenate([coarse, fine]).astype(jnp.int8)
    codes = jnp.pad(codes, ((0, max(0, LEAST_ROWS - 2 * count)), (0, 0)))
    sums = lax.dot_general(
      codes, self.codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    return (sums[:count] + sums[count : 2 * count] / _FINER) * step * self.scales[None, :]

  def whole(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """Logits of the float32 head."""
    rows = self.rows.astype(states.dtype)
    return lax.dot_general(states, rows, (((1,), (1,)), ((), ())))


def quantize(head: Float[Array, "emb pieces"]) -> QuantizedHead:
  """A head, rounded.

  Args:
    head: float32 or narrower; it is the head that `QuantizedHead` is exact for.
  """
  rows = head.T
  wide = rows.astype(jnp.float32)
  scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=1), 1e-30) / _CODES
  codes = jnp.round(wide / scales[:, None])
  left = jnp.linalg.norm(wide - codes * scales[:, None], axis=1)
  # What both codes of a state leave of each number is at most half a fine step.
  unseen = math.sqrt(rows.shape[1]) / (2 * _FINER * _CODES)
  slack = left + (unseen + _ROUNDING) * jnp.linalg.norm(wide, axis=1)
  return QuantizedHead(rows, codes.astype(jnp.int8), scales, slack)


def size(head: jax.Array | QuantizedHead) -> float:
  """Float32 numbers whose reading takes as long as the head's."""
  return head.codes.size / 4 if isinstance(head, QuantizedHead) else head.size
