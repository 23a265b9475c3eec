"""What passes over drafted tokens carry, and what they ask of a decoder. Knows no network."""

from typing import Any, Protocol

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import drafting, loop


@struct.dataclass
class Drafted:
  """What a pass has drafted so far.

  Attributes:
    count: positions that ran the first layers, [].
    tokens: the draft made at each, which the next one reads, [batch, window].
    confidences: those of the drafts, [batch, window].
    work: the passes' own.
    cache: every layer's, those of layers 1 ... k written; None: apart.
  """

  count: jax.Array
  tokens: jax.Array
  confidences: jax.Array
  work: Any
  cache: Any


@struct.dataclass
class VerifiedState:
  """The loop's carry.

  Attributes:
    positions: tokens that each row has generated, [batch].
    current: each row's last token, which its next pass reads, [batch].
    active: rows that still generate, [batch] bool.
    generation: filled up to `positions`.
    log_probabilities: of the emitted tokens, [batch, length].
    odds: how often drafts were accepted.
    idle: drafting passes since the last one that emitted two tokens of any row, [].
    waits: passes before the next one that drafts, [].
    last: what the pass before drafted, room for the next one's: to make room anew takes longer.
    cache: every layer's.
  """

  positions: Int[Array, " batch"]
  current: Int[Array, " batch"]
  active: Bool[Array, " batch"]
  generation: loop.Generation
  log_probabilities: Float[Array, "batch length"]
  odds: drafting.Odds
  idle: Int[Array, ""]
  waits: Int[Array, ""]
  last: Drafted
  cache: Any


class Passes(Protocol):
  """What the loop asks of a decoder whose rows stand at `positions` [batch]."""

  @property
  def num_layers(self) -> int:
    """L."""
    ...

  def empty(self) -> Any:
    """Caches that hold nothing yet."""
    ...

  def room(self, batch_size: int) -> Any:
    """What the first pass of all works on (`Drafted.work`), zeros."""
    ...

  def zeros_like(self, arrays: Any) -> Any:
    """Zeros of these shapes, made as the platform makes them fastest."""
    ...

  def begin(self, work: Any, positions: jax.Array) -> Any:
    """What a pass works on, its rows at `positions` [batch], in the room of the one before."""
    ...

  def draft(
    self, work: Any, cache: Any, token: jax.Array, at: jax.Array, wanted: jax.Array
  ) -> tuple[exits.verified.Draft, Any, Any]:
    """Runs layers 1 ... k on `token` [batch], `at` positions after the row's own.

    Returns:
      The draft (nothing where none is `wanted` []), the work and the caches.
    """
    ...

  def verify(
    self, work: Any, cache: Any, drafted: Drafted, made: jax.Array, threshold: jax.Array
  ) -> tuple[exits.verified.Verdict, Any, Any]:
    """Runs the other layers and the head over the pass's positions; `made` [window] says
    which have a draft.

    Returns:
      The verdict, [batch, window], the work and the caches.
    """
    ...

  def step(
    self, current: jax.Array, position: jax.Array, active: jax.Array, cache: Any
  ) -> tuple[exits.TokenExit, Any]:
    """One token at full depth of rows that are all at `position` []: a `loop.Step`."""
    ...
