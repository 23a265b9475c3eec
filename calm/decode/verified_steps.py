"""Steps of the full model between passes over drafts: what a text costs while it has none."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from calm.decode import loop
from calm.decode.verified_state import VerifiedState


@dataclasses.dataclass(frozen=True)
class Steps:
  """A token at a time, at full depth, of rows that are in step.

  A pass that drafts nothing says the same, and costs more: it is made for rows that each have
  a position of their own, and for several tokens of each.

  Attributes:
    step: runs one position.
    room: positions that a step or pass may begin at; ends before one that would begin beyond.
    eos_id: the token that ends a row.
    prefix: see `verified.Verifying`.
  """

  step: loop.Step
  room: int
  eos_id: Any
  prefix: Int[Array, "batch length"] | None = None

  def unfinished(self, state: VerifiedState) -> jax.Array:
    """Whether there is more to decode, [] bool."""
    has_room = jnp.all(~state.active | (state.positions < self.room))
    return jnp.any(state.active) & has_room

  def due(self, state: VerifiedState) -> jax.Array:
    """How many to take before the next pass, []: while no draft is due, as far as no token is
    given and none where rows stand at positions of their own."""
    position = _position(state)
    end = jnp.minimum(position + state.waits, self.room)
    if self.prefix is not None:
      column = jnp.arange(self.prefix.shape[1], dtype=jnp.int32)[None, :]
      given = (self.prefix > 0) & (column >= position) & state.active[:, None]
      end = jnp.minimum(end, jnp.min(jnp.where(given, column, self.room)))
    in_step = jnp.all(~state.active | (state.positions == position))
    return jnp.where(in_step, end - position, 0)

  def take(self, state: VerifiedState, count: jax.Array) -> VerifiedState:
    """So many of them, fewer where every row ends before."""
    seen = state.generation.verification
    assert seen is not None  # `Verifying.begin` made it
    begun = loop.DecodingState(
      position=_position(state),
      current=state.current,
      active=state.active,
      generation=dataclasses.replace(state.generation, verification=None),
      log_probabilities=state.log_probabilities,
      cache=state.cache,
    )
    end = begun.position + count
    made = loop.go_on(self.step, begun, state.cache, step_limit=end, eos_id=self.eos_id)
    # A row that ends has its last token at fewer positions than the others.
    new = made.generation.num_tokens - state.generation.num_tokens
    return dataclasses.replace(
      state,
      positions=state.positions + new,
      current=made.current,
      active=made.active & (made.position < made.log_probabilities.shape[1]),
      generation=dataclasses.replace(made.generation, verification=seen),
      log_probabilities=made.log_probabilities,
      waits=state.waits - (made.position - begun.position),
      cache=made.cache,
    )


def _position(state: VerifiedState) -> jax.Array:
  """That of the rows that are in step, []; else the furthest one's."""
  if len(state.positions) == 1:
    return state.positions[0]
  return jnp.max(jnp.where(state.active, state.positions, 0))
