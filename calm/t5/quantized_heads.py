"""An output head that is read in 8 bits, and in float32 only where that decides.

A product with the whole head costs what reading its float32 matrix costs. Here every piece's
column is rounded to 8 bits first; a bound on what rounding can change says which pieces may be
the most likely one, and those are scored again in float32. Where more pieces are in question
than are scored again, the float32 head is asked whole. So the largest logit and its place are
those of the float32 head; of the others, which only a softmax's sum reads, most are rounded.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm.exits import layers
from calm.t5 import eight_bits

# Pieces that are scored again, most.
CANDIDATES = 32
# What the first code of a state leaves is coded again, so much finer, where there are rows to
# spare.
_FINER = 254.0
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
    coded: the head in 8 bits.
    left: norms of what the codes leave of the pieces.
    norms: norms of what they do not leave.
  """

  rows: Float[Array, "pieces emb"]
  coded: eight_bits.EightBits
  left: Float[Array, " pieces"]
  norms: Float[Array, " pieces"]

  def logits(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """float32 logits, the largest of each row that of the float32 head.

    Args:
      states: decoder_norm(d^i), float32.
    """
    if len(self.rows) <= CANDIDATES:
      return self.whole(states)
    found, batch = self._candidates(states), jnp.arange(len(states))[:, None]
    return lax.cond(
      found.certain,
      lambda: found.logits.at[batch, found.places].set(found.scored),
      lambda: self.whole(states),
    )

  def greedy(self, states: Float[Array, "batch emb"]) -> layers.Greedy:
    """The argmax of these logits and its log-probability, without writing them all."""
    if len(self.rows) <= CANDIDATES:
      return layers.greedy(self.whole(states))
    found = self._candidates(states)
    return lax.cond(found.certain, found.greedy, lambda: layers.greedy(self.whole(states)))

  def score(
    self, states: Float[Array, "batch emb"], pieces: Int[Array, "batch *places"]
  ) -> Float[Array, "batch *places"]:
    """The float32 head's logits of some pieces of each row."""
    # Multiplied and summed: of a product XLA:CPU would transpose the whole head first.
    wide = jnp.expand_dims(states, tuple(range(1, pieces.ndim)))
    return jnp.sum(self.rows[pieces].astype(jnp.float32) * wide, axis=-1)

  def _candidates(self, states: Float[Array, "batch emb"]) -> "_Candidates":
    """The pieces that may be the most likely, scored again."""
    rounded = self.rounded(states)
    upper, places = largest(rounded.logits + rounded.slack, CANDIDATES)
    scored = self.score(states, places)
    certain = jnp.all(jnp.max(scored, axis=1) > jnp.min(upper, axis=1))
    return _Candidates(rounded.logits, places, scored, certain)

  def rounded(self, states: Float[Array, "batch emb"]) -> Rounded:
    """Logits of the 8-bit head, and how far off they may be.

    With a piece w coded as v and a state x as y, w x - v y = (w - v) x + v (x - y), which is at
    most |w - v| |x| + |v| |x - y|.
    """
    codes, steps = coded(states)
    count = len(states)
    sums = self.coded.sums_of(jnp.concatenate(codes)).astype(jnp.float32)
    logits = sum(sums[i * count : (i + 1) * count] * step for i, step in enumerate(steps))
    of_left, of_norms = slack_factors(states, seen(codes, steps))
    slack = of_left * self.left[None, :] + of_norms * self.norms[None, :]
    return Rounded(logits * self.coded.scales[None, :], slack)

  def whole(self, states: Float[Array, "batch emb"]) -> Float[Array, "batch pieces"]:
    """Logits of the float32 head."""
    rows = self.rows.astype(states.dtype)
    return lax.dot_general(states, rows, (((1,), (1,)), ((), ())))


@struct.dataclass
class _Candidates:
  """Pieces that may be the most likely.

  Attributes:
    logits: of all pieces, rounded.
    places: of the candidates.
    scored: their float32 logits.
    certain: whether the most likely piece of every row is one of them.
  """

  logits: Float[Array, "batch pieces"]
  places: Int[Array, "batch candidates"]
  scored: Float[Array, "batch candidates"]
  certain: Bool[Array, ""]

  def greedy(self) -> layers.Greedy:
    """Where it is certain."""
    top = jnp.max(self.scored, axis=1, keepdims=True)
    last = self.logits.shape[1] - 1
    token = jnp.min(jnp.where(self.scored == top, self.places, last), axis=1)
    rounded = jnp.take_along_axis(self.logits, self.places, axis=1)
    # Of all pieces as they are rounded; then those that are known better.
    total = jnp.sum(_fold(jnp.add, jnp.exp(_padded(self.logits) - top)), axis=1)
    better = jnp.exp(self.scored - top) - jnp.exp(rounded - top)
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


def seen(codes: Sequence[jax.Array], steps: Sequence[jax.Array]) -> Float[Array, "batch emb"]:
  """The states that codes stand for."""
  return functools.reduce(jnp.add, map(jnp.multiply, codes, steps))


def slack_factors(
  states: Float[Array, "batch emb"], coded_as: Float[Array, "batch emb"]
) -> tuple[Float[Array, "batch 1"], Float[Array, "batch 1"]]:
  """What a head's `left` and `norms` are multiplied with: their sum is the slack.

  Args:
    states: the rows.
    coded_as: from `seen`.
  """
  norm = lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
  of_left = norm(states)
  return of_left, norm(states - coded_as) + _ROUNDING * of_left


def coded(
  states: Float[Array, "batch emb"],
) -> tuple[list[Float[Array, "batch emb"]], list[Float[Array, "batch 1"]]]:
  """Codes of states, and what they are multiplied with: their sum is nearly the states."""
  step = eight_bits.step(states)
  coarse = jnp.round(states / step)
  if 2 * len(states) > eight_bits.least_rows():
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
  # A group's members lie `groups` apart, so that neighbours are compared with neighbours.
  padded = _padded(values)
  members = padded.reshape(batch, _GROUP, groups)
  _, chosen = lax.top_k(_fold(jnp.maximum, padded), count)
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
  coded = eight_bits.of_rows(rows)
  left = jnp.linalg.norm(rows.astype(jnp.float32) - coded.seen, axis=1)
  return QuantizedHead(rows, coded, left, jnp.linalg.norm(coded.seen, axis=1))
