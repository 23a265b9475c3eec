"""Matrices in 8 bits, and output heads that are read in 8 bits first.

A column of a matrix is rounded by a step of its own, whose code 127 is its
largest number. Few rows meet the codes as float32, or rounded to 16 bits
(`rounded`), which changes a thousandth of what the codes do. Many rows wait for
the products, and are rounded as columns are, as in CTranslate2, where a kernel
multiplies codes (`EightBits`): sums of codes are whole numbers, and a row's
product depends on nothing beside it.

Of a head, a bound on what rounding can change says which pieces may be the most
likely one, and those are scored again in float32: the largest logit and its
place are the float32 head's.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32, Shaped

from calm.t5 import kernels, platforms, tiles

_ONE_CODE = np.float32(1 / 127)  # codes lie in -127 ... 127
# Added to codes that must have no sign.
_SHIFT = 128
# Of float32 sums, relative to the norms of what is multiplied.
_ROUNDING = 1e-5


def step(numbers: Float[Array, "rows inputs"]) -> Float[Array, "rows 1"]:
  """What the codes of each row are multiplied with."""
  # Not divided by 127: XLA does so in one way for one row and in another for
  # several.
  return (
    jnp.maximum(jnp.max(jnp.abs(numbers), axis=1, keepdims=True), 1e-30)
    * _ONE_CODE
  )


@struct.dataclass
class EightBits:
  """A matrix in 8 bits: column j is nearly `codes[j] * scales[j]`."""

  # Of the matrix, transposed; or in tiles, as `kernels.coded_product` reads it.
  codes: Int8[Array, "outputs inputs"] | Int8[Array, "tiles groups codes"]
  shifts: Int32[Array, " outputs"]  # -128 times the sums of each column's codes
  scales: Float[Array, " outputs"]
  # columns; those of tiles behind them are 0
  outputs: int = struct.field(pytree_node=False)

  @property
  def tiled(self) -> bool:
    """Whether it lies in tiles."""
    return self.codes.ndim == 3

  def product(
    self, x: Float[Array, "*rows inputs"], count: Int[Array, ""] | None = None
  ) -> Float[Array, "*rows outputs"]:
    """Nearly `x @ matrix`, in the dtype of `x`, of which only the first `count`
    rows are asked for, if that is given. In tiles rows are rounded to 8 bits,
    too:

    sum_i round(x_i / s) codes_ji  *  s scales_j,   s = max_i |x_i| / 127
    """
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if self.tiled:
      made = kernels.coded_product(wide, [self], (), count)
    else:  # whole: XLA:CPU multiplies codes no faster
      numbers = self.codes.astype(jnp.float32)
      made = (
        lax.dot_general(wide, numbers, (((1,), (1,)), ((), ())))
        * self.scales[None, :]
      )
    return made.astype(x.dtype).reshape(*x.shape[:-1], -1)


def quantize(
  matrix: Shaped[Array, "inputs outputs"], tiled: bool = False
) -> EightBits:
  """A matrix, rounded; `tiled` for `kernels.coded_product`, where that is
  available.
  """
  wide = jnp.asarray(matrix).T.astype(jnp.float32)
  scales = step(wide)
  outputs = len(wide)
  codes = jnp.round(wide / scales).astype(jnp.int8)
  shifts = -_SHIFT * jnp.sum(codes, axis=1, dtype=jnp.int32)
  if not (tiled and kernels.multiplies_codes()):
    return EightBits(codes, shifts, scales[:, 0], outputs)
  width = platforms.WIDTH
  group = platforms.GROUP
  more = 0, -outputs % width
  codes = jnp.pad(codes, (more, (0, -codes.shape[1] % group)))
  groups = codes.reshape(len(codes) // width, width, -1, group).swapaxes(1, 2)
  codes = groups.reshape(*groups.shape[:2], -1)
  return EightBits(
    codes, jnp.pad(shifts, more), jnp.pad(scales[:, 0], more), outputs
  )


def rounded(matrix: Shaped[Array, "inputs outputs"]) -> tiles.Tiles:
  """A matrix, its columns rounded."""
  made = quantize(matrix)
  return tiles.tiled(made.codes.T, made.scales)


@struct.dataclass
class QuantizedHead:
  """One output head."""

  rows: Float[Array, "pieces emb"]  # float32, transposed
  coded: tiles.Tiles  # the head, its pieces rounded
  # How far a rounded piece's product with a state of norm 1 may be from the
  # piece's.
  slack: Float[Array, " pieces"]

  def logits(
    self, states: Float[Array, "batch emb"]
  ) -> Float[Array, "batch pieces"]:
    """float32 logits of decoder_norm(d^i): the largest of each row, and all
    that might have been, are the float32 head's, the others are rounded.
    """
    norms = jnp.linalg.norm(states, axis=1)
    return kernels.rescored(
      self.rounded(states), norms, self.slack, states, self.rows
    )

  def whole(
    self, states: Float[Array, "batch emb"]
  ) -> Float[Array, "batch pieces"]:
    """Logits of the float32 head, for programs that are not native."""
    return lax.dot_general(states, self.rows, (((1,), (1,)), ((), ())))

  def rounded(
    self, states: Float[Array, "batch emb"]
  ) -> Float[Array, "batch pieces"]:
    """Logits of the 8-bit head."""
    return self.coded.product(states, native=True)


def quantize_head(head: Float[Array, "emb pieces"]) -> QuantizedHead:
  """A head, rounded, where `kernels.available`.

  With a piece w coded as v and a state x rounded to y, w x - v y = (w - v) x +
  v (x - y), which is at most |w - v| |x| + |v| |x - y|.
  """
  rows = head.T.astype(jnp.float32)
  made = quantize(head)
  inputs = len(head)
  decoded = made.codes.astype(jnp.float32) * made.scales[:, None]
  left, norms = (jnp.linalg.norm(x, axis=1) for x in (rows - decoded, decoded))
  of_states = np.sqrt(inputs) / (2 * kernels.row_steps(inputs)) + _ROUNDING
  return QuantizedHead(
    rows, tiles.tiled(made.codes.T, made.scales), left + of_states * norms
  )
