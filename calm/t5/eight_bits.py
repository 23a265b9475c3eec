"""Matrices in 8 bits, and output heads that are read in 8 bits first.

A column of a matrix is rounded by a step of its own, whose code 127 is its largest number. Few
rows wait for the codes to be read, and stay float32 (`rounded`). Many rows wait for the
products, and are rounded as columns are, as in CTranslate2 (`EightBits`): sums of codes are
whole numbers, and a row's product depends on nothing beside it.

Of a head, a bound on what rounding can change says which pieces may be the most likely one, and
those are scored again in float32: the largest logit and its place are the float32 head's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32, Shaped

from calm.exits import layers
from calm.t5 import kernels, platforms, tiles

_ONE_CODE = np.float32(1 / 127)  # codes lie in -127 ... 127
# 8-bit products have at least so many rows: XLA:CPU multiplies a single one number by number,
# and two in half the time in which it reads a float32 matrix for one.
LEAST_ROWS = 2
# Added to codes that must have no sign.
_SHIFT = 128
# Pieces that are scored again, most.
CANDIDATES = 32
# What the first code of a state leaves is coded again, so much finer, where there are rows to
# spare.
_FINER = 254.0
# Of float32 sums, relative to the norms of what is multiplied.
_ROUNDING = 1e-5
# Pieces of which one is looked at first, where the largest are sought.
_GROUP = 16


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

  rows: Float[Array, "pieces emb"]  # transposed, in the dtype of the matrices
  coded: EightBits
  # Norms of what the codes leave of the pieces, and of what they keep.
  left: Float[Array, " pieces"]
  norms: Float[Array, " pieces"]

  def logits(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """float32 logits of decoder_norm(d^i), the largest of each row that of the float32 head."""
    if len(self.rows) <= CANDIDATES:
      return self.whole(states)
    logits, places, scored, certain = self._candidates(states)
    batch = jnp.arange(len(states))[:, None]
    return lax.cond(
      certain, lambda: logits.at[batch, places].set(scored), lambda: self.whole(states)
    )

  def greedy(self, states: Float[Array, "batch emb"]) -> layers.Greedy:
    """The argmax of these logits and its log-probability, without writing them all."""
    if len(self.rows) <= CANDIDATES:
      return layers.greedy(self.whole(states))
    rounded, factors = self._rounded(states)
    found = kernels.likeliest(rounded, factors, self.left, self.norms, states, self.rows)
    if found is not None:
      return layers.Greedy(found[0], -jnp.log(found[1]))
    logits, places, scored, certain = self._candidates(states)
    return lax.cond(
      certain,
      lambda: _greedy(logits, places, scored),
      lambda: layers.greedy(self.whole(states)),
    )

  def score(
    self, states: Float[Array, "batch emb"], pieces: Int[Array, "batch *places"]
  ) -> Float[Array, "batch *places"]:
    """The float32 head's logits of some pieces of each row."""
    # Multiplied and summed: of a product XLA:CPU would transpose the whole head first.
    wide = jnp.expand_dims(states, tuple(range(1, pieces.ndim)))
    return jnp.sum(self.rows[pieces].astype(jnp.float32) * wide, axis=-1)

  def _candidates(self, states: jax.Array) -> tuple[jax.Array, ...]:
    """Rounded logits; the pieces that may be the most likely, their float32 logits, and whether
    the most likely one of every row is among them."""
    logits, slack = self.rounded(states)
    upper, places = largest(logits + slack, CANDIDATES)
    scored = self.score(states, places)
    certain = jnp.all(jnp.max(scored, axis=1) > jnp.min(upper, axis=1))
    return logits, places, scored, certain

  def rounded(
    self, states: Float[Array, "batch emb"]
  ) -> tuple[Float[Array, "batch pieces"], Float[Array, "batch pieces"]]:
    """Logits of the 8-bit head, and the most that the float32 head's differ from them.

    With a piece w coded as v and a state x as y, w x - v y = (w - v) x + v (x - y), which is at
    most |w - v| |x| + |v| |x - y|.
    """
    logits, factors = self._rounded(states)
    return logits, factors[:, :1] * self.left[None, :] + factors[:, 1:] * self.norms[None, :]

  def _rounded(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of the 8-bit head; [batch, 2] what `left` and `norms` are multiplied with."""
    codes, steps = _codes(states)
    count = len(states)
    sums = self.coded.sums_of(jnp.concatenate(codes)).astype(jnp.float32)
    logits = sum(sums[i * count : (i + 1) * count] * one for i, one in enumerate(steps))
    norm = lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
    coded_as = functools.reduce(jnp.add, map(jnp.multiply, codes, steps))
    of_left = norm(states)
    of_norms = norm(states - coded_as) + _ROUNDING * of_left
    return logits * self.coded.scales[None, :], jnp.concatenate([of_left, of_norms], axis=1)

  def whole(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """Logits of the float32 head."""
    rows = self.rows.astype(states.dtype)
    return lax.dot_general(states, rows, (((1,), (1,)), ((), ())))


def _greedy(logits: jax.Array, places: jax.Array, scored: jax.Array) -> layers.Greedy:
  """The argmax where it is among the candidates at `places`."""
  top = jnp.max(scored, axis=1, keepdims=True)
  token = jnp.min(jnp.where(scored == top, places, logits.shape[1] - 1), axis=1)
  rounded = jnp.take_along_axis(logits, places, axis=1)
  # Of all pieces as they are rounded; then those that are known better.
  total = jnp.sum(_fold(jnp.add, jnp.exp(_padded(logits) - top)), axis=1)
  better = jnp.exp(scored - top) - jnp.exp(rounded - top)
  return layers.Greedy(token.astype(jnp.int32), -jnp.log(total + jnp.sum(better, axis=1)))


def _fold(
  combine: Callable[[jax.Array, jax.Array], jax.Array], values: Float[Array, "batch pieces"]
) -> Float[Array, "batch groups"]:
  """Every group's values combined: XLA:CPU does so while it makes them, and writes none."""
  groups = values.shape[1] // _GROUP
  members = [values[:, i * groups : (i + 1) * groups] for i in range(_GROUP)]
  return functools.reduce(combine, members)


def _padded(values: Float[Array, "batch pieces"]) -> Float[Array, "batch more"]:
  """With -inf up to whole groups."""
  missing = -values.shape[1] % _GROUP
  return (
    jnp.pad(values, ((0, 0), (0, missing)), constant_values=-jnp.inf) if missing else values
  )


def _codes(states: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
  """Codes of states, and what they are multiplied with: their sum is nearly the states."""
  one = step(states)
  coarse = jnp.round(states / one)
  if 2 * len(states) > least_rows():
    return [coarse], [one]
  return [coarse, jnp.round((states / one - coarse) * _FINER)], [one, one / _FINER]


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
  # A group's members lie `groups` apart, so that neighbours are compared with neighbours.
  padded = _padded(values)
  members = padded.reshape(batch, _GROUP, groups)
  _, chosen = lax.top_k(_fold(jnp.maximum, padded), count)
  few = jnp.take_along_axis(members, chosen[:, None, :], axis=2).reshape(batch, -1)
  found, at = lax.top_k(few, count)
  group = jnp.take_along_axis(chosen, at % count, axis=1)
  return found, at // count * groups + group


def quantize_head(head: Float[Array, "emb pieces"]) -> QuantizedHead:
  """A head, float32 or narrower, rounded; it is the one that `QuantizedHead` is exact for."""
  rows, coded = head.T, quantize(head)
  decoded = coded.codes.astype(jnp.float32) * coded.scales[:, None]
  left = jnp.linalg.norm(rows.astype(jnp.float32) - decoded, axis=1)
  return QuantizedHead(rows, coded, left, jnp.linalg.norm(decoded, axis=1))
