"""An output head that is read in 8 bits, and in float32 only where that decides.

A product with the whole head costs what reading its float32 matrix costs. Here every piece's
column is rounded to 8 bits first; a bound on what rounding can change says which pieces may be
the most likely one, and those are scored again in float32. Where more pieces are in question
than are scored again, the float32 head is asked whole. So the largest logit and its place are
those of the float32 head; of the others, which only a softmax's sum reads, most are rounded.
"""

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32, Shaped

from calm.t5 import platforms

# Pieces that are scored again, most.
CANDIDATES = 32
# 8-bit products have at least so many rows: XLA:CPU multiplies a single one number by number,
# and two in half the time in which it reads the float32 head for one.
LEAST_ROWS = 2
# Codes lie in -127 ... 127; what the first code of a state leaves is coded again, finer, where
# there are rows to spare.
_CODES, _FINER = 127.0, 254.0
# Added to codes that must have no sign.
_SHIFT = 128
# Of float32 sums, relative to the norms of what is multiplied.
_ROUNDING = 1e-5
# Pieces of which one is looked at first, where the largest are sought.
_GROUP = 16


@struct.dataclass
class Rounded:
  """Logits of the 8-bit head.

  Attributes:
    logits: theirs.
    slack: the float32 head's differ from them by at most this.
  """

  logits: Float[Array, "batch pieces"]
  slack: Float[Array, "batch pieces"]


@struct.dataclass
class QuantizedHead:
  """One output head.

  Attributes:
    rows: the head, transposed, in the dtype of the matrices.
    codes: its pieces in 8 bits.
    sums: of each piece's codes.
    scales: what a piece's codes are multiplied with.
    left: norms of what the codes leave of the pieces.
    norms: norms of what they do not leave.
  """

  rows: Float[Array, "pieces emb"]
  codes: Int8[Array, "pieces emb"]
  sums: Int32[Array, " pieces"]
  scales: Float[Array, " pieces"]
  left: Float[Array, " pieces"]
  norms: Float[Array, " pieces"]

  def logits(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """float32 logits, the largest of each row that of the float32 head.

    Args:
      states: decoder_norm(d^i), float32.
    """
    if self.codes.shape[0] <= CANDIDATES:
      return self.whole(states)
    rounded = self.rounded(states)
    upper, places = largest(rounded.logits + rounded.slack, CANDIDATES)
    # Multiplied and summed: of a product XLA:CPU would transpose the whole head first.
    scored = jnp.sum(self.rows[places].astype(jnp.float32) * states[:, None], axis=-1)
    certain = jnp.all(jnp.max(scored, axis=1) > jnp.min(upper, axis=1))
    batch = jnp.arange(len(states))[:, None]
    return lax.cond(
      certain,
      lambda: rounded.logits.at[batch, places].set(scored),
      lambda: self.whole(states),
    )

  def rounded(self, states: Float[Array, "batch emb"]) -> Rounded:
    """Logits of the 8-bit head, and how far off they may be.

    With a piece w coded as v and a state x as y, w x - v y = (w - v) x + v (x - y), which is at
    most |w - v| |x| + |v| |x - y|.
    """
    codes, steps = _coded(states)
    count = len(states)
    sums = self._products(jnp.concatenate(codes))
    logits = sum(sums[i * count : (i + 1) * count] * step for i, step in enumerate(steps))
    seen = sum(code * step for code, step in zip(codes, steps, strict=True))
    norm = lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
    left, norms = self.left[None, :], self.norms[None, :]
    slack = norm(states) * (left + _ROUNDING * norms) + norm(states - seen) * norms
    return Rounded(logits * self.scales[None, :], slack)

  def _products(self, codes: Float[Array, "rows emb"]) -> Float[Array, "rows pieces"]:
    """Sums of products of codes, which 32 bits hold."""
    padding = max(0, _least_rows() - len(codes))
    codes = jnp.pad(codes, ((0, padding), (0, 0)))
    if platforms.multiplies_unsigned():  # (c + 128) w = c w + 128 w
      unsigned = (codes + _SHIFT).astype(jnp.uint8)
      sums = _dot(unsigned, self.codes) - _SHIFT * self.sums[None, :]
    else:
      sums = _dot(codes.astype(jnp.int8), self.codes)
    return sums.astype(jnp.float32)

  def whole(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """Logits of the float32 head."""
    rows = self.rows.astype(states.dtype)
    return lax.dot_general(states, rows, (((1,), (1,)), ((), ())))


def _dot(
  rows: Shaped[Array, "rows emb"], pieces: Int8[Array, "pieces emb"]
) -> Int32[Array, "rows pieces"]:
  return lax.dot_general(
    rows,
    pieces,
    (((1,), (1,)), ((), ())),
    # Without an algorithm JAX makes 32-bit numbers of 8-bit ones of which one side has a sign.
    precision=lax.DotAlgorithmPreset.DEFAULT,
    preferred_element_type=jnp.int32,
  )


def _least_rows() -> int:
  """Rows that take no longer than one."""
  return max(LEAST_ROWS, platforms.least_rows())


def _coded(
  states: Float[Array, "batch emb"],
) -> tuple[list[Float[Array, "batch emb"]], list[Float[Array, "batch 1"]]]:
  """Codes of states, and what they are multiplied with: their sum is nearly the states."""
  step = jnp.maximum(jnp.max(jnp.abs(states), axis=1, keepdims=True), 1e-30) / _CODES
  coarse = jnp.round(states / step)
  if 2 * len(states) > _least_rows():
    return [coarse], [step]
  return [coarse, jnp.round((states / step - coarse) * _FINER)], [step, step / _FINER]


def largest(
  values: Float[Array, "batch pieces"], count: int
) -> tuple[Float[Array, "batch count"], Int[Array, "batch count"]]:
  """The largest values of each row, and where they are, as `lax.top_k`.

  They lie in the `count` groups whose own largest are largest: XLA:CPU compares groups in
  vector registers, and what `top_k` is given value by value.
  """
  batch, pieces = values.shape
  groups = -(-pieces // _GROUP)
  if groups <= count:
    return lax.top_k(values, count)
  padded = jnp.pad(values, ((0, 0), (0, groups * _GROUP - pieces)), constant_values=-jnp.inf)
  # A group's members lie `groups` apart, so that neighbours are compared with neighbours.
  members = padded.reshape(batch, _GROUP, groups)
  _, chosen = lax.top_k(jnp.max(members, axis=1), count)
  few = jnp.take_along_axis(members, chosen[:, None, :], axis=2).reshape(batch, -1)
  found, at = lax.top_k(few, count)
  group = jnp.take_along_axis(chosen, at % count, axis=1)
  return found, at // count * groups + group


def quantize(head: Float[Array, "emb pieces"]) -> QuantizedHead:
  """A head, rounded.

  Args:
    head: float32 or narrower; it is the head that `QuantizedHead` is exact for.
  """
  rows = head.T
  wide = rows.astype(jnp.float32)
  scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=1), 1e-30) / _CODES
  codes = jnp.round(wide / scales[:, None])
  seen = codes * scales[:, None]
  left, norms = jnp.linalg.norm(wide - seen, axis=1), jnp.linalg.norm(seen, axis=1)
  narrow = codes.astype(jnp.int8)
  sums = jnp.sum(narrow, axis=1, dtype=jnp.int32)
  return QuantizedHead(rows, narrow, sums, scales, left, norms)
