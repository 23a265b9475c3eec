"""Products in 8 bits: what rows and a matrix are rounded to, and the sums of their products.

A matrix is rounded once, each of its columns by a step of its own; rows when they are
multiplied, each by its own step. Sums of products of codes are whole numbers, so that a row's
product depends neither on the rows beside it nor on the order of its sums. Steps are chosen as
CTranslate2 chooses them: the largest number of a row or column is code 127.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Shaped

from calm.t5 import platforms

# Codes lie in -127 ... 127.
CODES = 127.0
_ONE_CODE = np.float32(1 / CODES)
# 8-bit products have at least so many rows: XLA:CPU multiplies a single one number by number,
# and two in half the time in which it reads a float32 matrix for one.
LEAST_ROWS = 2
# Added to codes that must have no sign.
_SHIFT = 128


def least_rows() -> int:
  """Rows that take no longer than one."""
  return max(LEAST_ROWS, platforms.least_rows())


def step(numbers: Float[Array, "rows inputs"]) -> Float[Array, "rows 1"]:
  """What the codes of each row are multiplied with."""
  # Not divided by 127: XLA does so in one way for one row and in another for several.
  return jnp.maximum(jnp.max(jnp.abs(numbers), axis=1, keepdims=True), 1e-30) * _ONE_CODE


@struct.dataclass
class EightBits:
  """A matrix in 8 bits: column j is nearly `codes[j] * scales[j]`.

  Attributes:
    codes: of the matrix, transposed.
    sums: of each column's codes.
    scales: what a column's codes are multiplied with.
    packed: the codes again, as `native.product_in_8_bits` reads them; None: XLA multiplies.
  """

  codes: Int8[Array, "outputs inputs"]
  sums: Int32[Array, " outputs"]
  scales: Float[Array, " outputs"]
  packed: Int8[Array, "vectors quads bytes"] | None = None

  def product(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
    """Nearly `x @ matrix`, in the dtype of `x`: rows are rounded to 8 bits, too.

    sum_i round(x_i / s) codes_ji  *  s scales_j,   s = max_i |x_i| / 127
    """
    if self.packed is not None and x.dtype == jnp.float32 and platforms.multiplies_bytes():
      from calm.t5 import native  # which imports this module

      return native.product_in_8_bits(self, x)
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    one = step(wide)
    # Written as XLA computes a quotient by a number a row, so that all who do get its bits.
    sums = self.sums_of(jnp.round(wide * (1 / one))).astype(jnp.float32)
    made = (sums * (one * self.scales[None, :])).astype(x.dtype)
    return made.reshape(*x.shape[:-1], -1)

  def for_many_rows(self) -> "EightBits":
    """The matrix laid out for them too, where a CPU gains by it: products are the same."""
    from calm.t5 import native  # which imports this module

    return native.pack(self)

  def sums_of(self, codes: Float[Array, "rows inputs"]) -> Int32[Array, "rows outputs"]:
    """Sums of products of codes, which 32 bits hold."""
    sums, offset = self.raw_sums(codes)
    return sums - offset * self.sums[None, :] if offset else sums

  def raw_sums(
    self, codes: Float[Array, "rows inputs"]
  ) -> tuple[Int32[Array, "rows outputs"], int]:
    """As `sums_of`, and what is still to be taken away: so many times `sums`."""
    count = len(codes)
    codes = jnp.pad(codes, ((0, max(0, least_rows() - count)), (0, 0)))
    if platforms.multiplies_unsigned():  # (c + 128) w = c w + 128 w
      unsigned = (codes + _SHIFT).astype(jnp.uint8)
      return _dot(unsigned, self.codes)[:count], _SHIFT
    return _dot(codes.astype(jnp.int8), self.codes)[:count], 0

  @property
  def seen(self) -> Float[Array, "outputs inputs"]:
    """The matrix that the codes stand for, transposed."""
    return self.codes.astype(jnp.float32) * self.scales[:, None]


def _dot(
  rows: Shaped[Array, "rows inputs"], codes: Int8[Array, "outputs inputs"]
) -> Int32[Array, "rows outputs"]:
  return lax.dot_general(
    rows,
    codes,
    (((1,), (1,)), ((), ())),
    # Without an algorithm JAX makes 32-bit numbers of 8-bit ones of which one side has a sign.
    precision=lax.DotAlgorithmPreset.DEFAULT,
    preferred_element_type=jnp.int32,
  )


def of_rows(rows: Shaped[Array, "outputs inputs"]) -> EightBits:
  """A transposed matrix, rounded."""
  wide = rows.astype(jnp.float32)
  scales = step(wide)
  codes = jnp.round(wide / scales).astype(jnp.int8)
  sums = jnp.sum(codes, axis=1, dtype=jnp.int32)
  return EightBits(codes, sums, scales[:, 0])


def quantize(matrix: Shaped[Array, "inputs outputs"]) -> EightBits:
  """A matrix, rounded."""
  return of_rows(jnp.asarray(matrix).T)
