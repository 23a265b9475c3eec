"""What passes write and read where every row has a position of its own. Knows no network."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from calm.exits import verified


def given(
  prefix: Int[Array, "batch length"] | None,
  positions: Int[Array, " batch"],
  count: int,
  window: int,
) -> Int[Array, "batch positions"]:
  """The prefix at `count` positions of each row, at most `window`; 0 where a row is free."""
  if prefix is None:
    return jnp.zeros((len(positions), count), jnp.int32)
  padded = jnp.pad(prefix, ((0, 0), (0, window)))
  at = positions[:, None] + jnp.arange(count)[None, :]
  return jnp.take_along_axis(padded, at, axis=1)


def obeying(
  verdict: verified.Verdict, given: Int[Array, "batch positions"]
) -> verified.Verdict:
  """With what a row is given, 0 where it is free, in place of what was drafted or decided."""
  known = given > 0
  free = lambda values: jnp.where(known, 0.0, values)
  return verified.Verdict(
    token=jnp.where(known, given, verdict.token),
    accepted=verdict.accepted | known,
    confidence=free(verdict.confidence),
    rejected_confidence=free(verdict.rejected_confidence),
    log_probability=free(verdict.log_probability),
  )


def count(
  leads: Bool[Array, "batch positions"], inside: Int[Array, " batch"]
) -> Int[Array, " batch"]:
  """How many positions of a pass become tokens, [batch].

  Args:
    leads: whether what the next position read is what was emitted, and ended nothing.
    inside: the most.
  """
  positions = leads.shape[1]
  at = jnp.arange(positions, dtype=jnp.int32)[None, :]
  last = jnp.min(jnp.where(leads, positions, at), axis=1)  # the first that leads nowhere
  return jnp.minimum(last + 1, inside)


def put(
  array: Shaped[Array, "batch length"],
  columns: Shaped[Array, "batch positions"],
  positions: Int[Array, " batch"],
  count: Int[Array, " batch"],
) -> Shaped[Array, "batch length"]:
  """`array` with the first `count` of `columns` at each row's position."""
  at = jnp.arange(array.shape[1], dtype=jnp.int32)[None, :] - positions[:, None]
  new = columns
  if columns.shape[1] > 1:
    new = jnp.take_along_axis(columns, jnp.clip(at, 0, columns.shape[1] - 1), axis=1)
  return jnp.where((at >= 0) & (at < count[:, None]), new.astype(array.dtype), array)
