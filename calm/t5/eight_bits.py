"""Matrices in 8 bits, and output heads that are read in 8 bits first.

A column of a matrix is rounded by a step of its own, whose code 127 is its largest number. Few
rows wait for the codes to be read, and stay float32 (`rounded`). Many rows wait for the
products, and are rounded as columns are, as in CTranslate2 (`EightBits`): sums of codes are
whole numbers, and a row's product depends on nothing beside it.

Of a head, a bound on what rounding can change says which pieces may be the most likely one, and
those are scored again in float32: the largest logit and its place are the float32 head's."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32, Shaped

from calm.t5 import kernels, platforms, tiles

_ONE_CODE = np.float32(1 / 127)  # codes lie in -127 ... 127
# 8-bit products have at least so many rows: XLA:CPU multiplies a single one number by number,
# and two in half the time in which it reads a float32 matrix for one.
LEAST_ROWS = 2
# Added to codes that must have no sign.
_SHIFT = 128
# Rows that are multiplied with codes in the time of one.
_TOGETHER = 6
# Of float32 sums, relative to the norms of what is multiplied.
_ROUNDING = 1e-5


def least_rows() -> int:
  """Rows that take no longer than one."""
  return max(LEAST_ROWS, platforms.least_rows())


def step(numbers: Float[Array, "rows inputs"]) -> Float[Array, "rows 1"]:
  """What the codes of each row are multiplied with."""
  # Not divided by 127: XLA does so in one way for one row and in another for several.
  return jnp.maximum(jnp.max(jnp.abs(numbers), axis=1, keepdims=True), 1e-30) * _ONE_CODE


@struct.dataclass
class EightBits:
  """A matrix in 8 bits: column j is nearly `codes[j] * scales[j]`."""

  # Of the matrix, transposed; or in tiles, as `kernels.coded_product` reads it.
  codes: Int8[Array, "outputs inputs"] | Int8[Array, "tiles groups codes"]
  shifts: Int32[Array, " outputs"]  # -128 times the sums of each column's codes
  scales: Float[Array, " outputs"]
  outputs: int = struct.field(pytree_node=False)  # columns; those of tiles behind them are 0

  @property
  def tiled(self) -> bool:
    """Whether it lies in tiles."""
    return self.codes.ndim == 3

  def product(
    self, x: Float[Array, "*rows inputs"], count: Int[Array, ""] | None = None
  ) -> Float[Array, "*rows outputs"]:
    """Nearly `x @ matrix`, in the dtype of `x`: rows are rounded to 8 bits, too, of which only
    the first `count` are asked for, if that is given.

    sum_i round(x_i / s) codes_ji  *  s scales_j,   s = max_i |x_i| / 127
    """
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if self.tiled:
      made = kernels.coded_product(wide, [self], (), count)
    else:
      one = step(wide)
      sums = self.sums_of(jnp.round(wide / one)).astype(jnp.float32)
      made = sums * (one * self.scales[None, :])
    return made.astype(x.dtype).reshape(*x.shape[:-1], -1)

  def sums_of(self, codes: Float[Array, "rows inputs"]) -> Int32[Array, "rows outputs"]:
    """Sums of products of codes, which 32 bits hold, of a matrix that is not in tiles."""
    count = len(codes)
    codes = jnp.pad(codes, ((0, max(0, least_rows() - count)), (0, 0)))
    unsigned = platforms.multiplies_unsigned()  # (c + 128) w = c w + 128 w
    rows = (codes + _SHIFT).astype(jnp.uint8) if unsigned else codes.astype(jnp.int8)
    sums = lax.dot_general(
      rows,
      self.codes,
      (((1,), (1,)), ((), ())),
      # Without an algorithm JAX makes 32-bit numbers of 8-bit ones of which one has a sign.
      precision=lax.DotAlgorithmPreset.DEFAULT,
      preferred_element_type=jnp.int32,
    )[:count]
    return sums + self.shifts[None, :] if unsigned else sums


def quantize(matrix: Shaped[Array, "inputs outputs"], tiled: bool = False) -> EightBits:
  """A matrix, rounded; `tiled` for `kernels.coded_product`, where that is available."""
  wide = jnp.asarray(matrix).T.astype(jnp.float32)
  scales, outputs = step(wide), len(wide)
  codes = jnp.round(wide / scales).astype(jnp.int8)
  shifts = -_SHIFT * jnp.sum(codes, axis=1, dtype=jnp.int32)
  if not (tiled and kernels.multiplies_codes()):
    return EightBits(codes, shifts, scales[:, 0], outputs)
  width, group = platforms.WIDTH, platforms.GROUP
  more = 0, -outputs % width
  codes = jnp.pad(codes, (more, (0, -codes.shape[1] % group)))
  groups = codes.reshape(len(codes) // width, width, -1, group).swapaxes(1, 2)
  codes = groups.reshape(*groups.shape[:2], -1)
  return EightBits(codes, jnp.pad(shifts, more), jnp.pad(scales[:, 0], more), outputs)


def rounded(matrix: Shaped[Array, "inputs outputs"]) -> tiles.Tiles:
  """A matrix, its columns rounded."""
  made = quantize(matrix)
  return tiles.tiled(made.codes.T, made.scales)


@struct.dataclass
class QuantizedHead:
  """One output head."""

  rows: Float[Array, "pieces emb"]  # float32, transposed
  coded: EightBits  # in tiles
  # Norms of what the codes leave of the pieces, and of what they keep.
  left: Float[Array, " pieces"]
  norms: Float[Array, " pieces"]

  def logits(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """float32 logits of decoder_norm(d^i): the largest of each row, and all that might have
    been, are the float32 head's, the others are rounded."""
    logits, factors = self.rounded(states)
    return kernels.rescored(logits, factors, self.left, self.norms, states, self.rows)

  def whole(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """Logits of the float32 head, for programs that are not native."""
    return lax.dot_general(states, self.rows, (((1,), (1,)), ((), ())))

  def rounded(
    self, states: Float[Array, "batch emb"]
  ) -> tuple[Float[Array, "batch pieces"], Float[Array, "batch two"]]:
    """Logits of the 8-bit head, and what `left` and `norms` are multiplied with to say how far
    the float32 head's are from them at most.

    With a piece w coded as v and a state x as y, w x - v y = (w - v) x + v (x - y), which is at
    most |w - v| |x| + |v| |x - y|.
    """
    coded, count = [_in_steps(states)], len(states)
    if 2 * count <= _TOGETHER:  # what rounding left is rounded, too, for nothing
      coded.append(_in_steps(states - coded[0]))
    products = self.coded.product(jnp.concatenate(coded))
    logits = functools.reduce(jnp.add, jnp.split(products, len(coded)))
    norm = lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
    of_left = norm(states)
    of_norms = norm(states - functools.reduce(jnp.add, coded)) + _ROUNDING * of_left
    return logits, jnp.concatenate([of_left, of_norms], axis=1)


def _in_steps(states: Float[Array, "batch emb"]) -> Float[Array, "batch emb"]:
  """States, rounded to whole multiples of their row's step."""
  one = step(states)
  return jnp.round(states / one) * one


def quantize_head(head: Float[Array, "emb pieces"]) -> QuantizedHead:
  """A head, rounded, where `kernels.multiplies_codes`."""
  rows, coded = head.T.astype(jnp.float32), quantize(head, tiled=True)
  # Rounded anew, since in tiles the codes lie otherwise.
  scales = step(rows)
  decoded = jnp.round(rows / scales) * scales
  left = jnp.linalg.norm(rows - decoded, axis=1)
  return QuantizedHead(rows, coded, left, jnp.linalg.norm(decoded, axis=1))
