"""A pool of rows: where a text has ended, the next prompt begins. Knows no network.

In a batch every row waits for the longest. Here the token loop stops once some rows are free;
prompts that wait take their places, and it goes on. All rows write into one slot of the
caches whatever token each is at, so that nothing is scattered: a row's own position is the
slot less its start, and what lies before its start is another text's, which the step masks.
When the slots run out, everything moves down by those that no row needs any more: there are
more of them than a text has tokens, so that each time some become free.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from calm.decode import loop


@struct.dataclass
class Pool:
  """The loop's carry, and what stays of it between two loops.

  Attributes:
    slot: where every row writes next, [].
    starts: slot of each row's first token, [batch]; below 0 once it was moved out.
    current: the last token, which the next step reads, [batch].
    active: rows that generate, [batch] bool; the others are free.
    generation: by slot, [batch, slots]; a row's text is what lies from its start on.
    cache: the step's own.
  """

  slot: Int[Array, ""]
  starts: Int[Array, " batch"]
  current: Int[Array, " batch"]
  active: Bool[Array, " batch"]
  generation: loop.Generation
  cache: Any


def num_slots(max_decode_length: int) -> int:
  """Slots of the caches: each that is more than a text's is read at every step, and makes
  moving down rarer."""
  return max_decode_length + max(max_decode_length // 4, 8)


def empty_pool(cache: Any, batch_size: int, slots: int) -> Pool:
  """A pool of free rows; `cache` is what the step starts from."""
  zeros = jnp.zeros((batch_size,), jnp.int32)
  empty = loop.empty_generation(batch_size, slots)
  return Pool(jnp.zeros((), jnp.int32), zeros, zeros, zeros > 0, empty, cache)


def advance(
  step: loop.Step,
  pool: Pool,
  *,
  eos_id: int,
  max_decode_length: int,
  min_free: Int[Array, ""],
) -> Pool:
  """Greedy decoding of every active row until some are free or the slots are used up.

  Args:
    step: runs one slot; it knows `pool.starts`.
    pool: the rows.
    eos_id: the token that ends a row.
    max_decode_length: most tokens of a row.
    min_free: how many free rows end the loop, at most the batch size.
  """
  slots = pool.generation.tokens.shape[1]

  def goes_on(now: Pool):
    return (jnp.sum(~now.active) < min_free) & (now.slot < slots)

  def one(now: Pool) -> Pool:
    active = now.active
    made, cache = step(now.current, now.slot, active, now.cache)
    emitted = loop.emitted(made, active)
    ends = (emitted.token == eos_id) | (now.slot + 1 - now.starts >= max_decode_length)
    generation = loop.record(now.generation, now.slot, active, emitted, made)
    return Pool(now.slot + 1, now.starts, emitted.token, active & ~ends, generation, cache)

  return lax.while_loop(goes_on, one, pool)


def take_in(
  pool: Pool, encoded: Any, waiting: Any, source: Int[Array, " batch"]
) -> tuple[Pool, Any]:
  """Puts prompts into free rows.

  Args:
    pool: the rows.
    encoded: their prompts, arrays [batch, ...].
    waiting: prompts, arrays [prompts, ...].
    source: which of `waiting` each row takes; -1 leaves a row as it is.

  Returns:
    The pool and its prompts; a row that took one begins at the pool's slot.
  """
  new = source >= 0
  rows = jnp.argsort(~new, stable=True)

  def move(i, encoded):
    row, at = rows[i], source[rows[i]]

    def put(to, of):
      return lax.dynamic_update_index_in_dim(to, lax.dynamic_index_in_dim(of, at), row, axis=0)

    return jax.tree.map(put, encoded, waiting)

  # Row after row, in place: what is copied are the prompts that come in, not the pool.
  encoded = lax.fori_loop(0, jnp.sum(new), move, encoded)
  scores = jnp.where(new, 0.0, pool.generation.scores)
  taken = dataclasses.replace(
    pool,
    starts=jnp.where(new, pool.slot, pool.starts),
    current=jnp.where(new, 0, pool.current),
    active=pool.active | new,
    generation=dataclasses.replace(pool.generation, scores=scores),
  )
  return taken, encoded


def shift(pool: Pool, shift_cache: Callable[[Any, jax.Array], Any]) -> Pool:
  """Drops the slots before the first one that an active row needs.

  Args:
    pool: the rows; what free rows generated is lost as far as it lies there.
    shift_cache: (cache, by) -> the same with slot `by` now the first.
  """
  by = jnp.min(jnp.where(pool.active, pool.starts, pool.slot))
  old = pool.generation
  move = lambda array: loop.shift_positions(array, by, axis=1)
  generation = loop.Generation(
    *map(move, (old.tokens, old.exit_layers, old.confidences, old.rejected_confidences)),
    scores=old.scores,
  )
  return dataclasses.replace(
    pool,
    slot=pool.slot - by,
    starts=pool.starts - by,
    generation=generation,
    cache=shift_cache(pool.cache, by),
  )
