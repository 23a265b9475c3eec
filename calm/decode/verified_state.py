"""What passes over drafted tokens carry, and what they ask of a decoder. Knows no network."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import drafting, loop
from calm.exits import layers


@struct.dataclass
class Drafted:
  """What a pass has drafted so far; between two passes, room for it.

  Attributes:
    ended: whether it reads on from its last draft no more, [] bool; False of a pass that
      drafts nothing and whose rows are given no token.
    count: positions whose drafts are read on from, [].
    tokens: the draft made at each position, [batch, window].
    confidences: those of the drafts, [batch, window].
    reach: how likely the next position is to be read.
    gap: `exits.verified.Said.gap` of the draft of a pass of one position, [batch].
    work: what the passes keep of the positions.
  """

  ended: jax.Array
  count: jax.Array
  tokens: jax.Array
  confidences: jax.Array
  reach: drafting.Reach
  gap: jax.Array
  work: Any


@struct.dataclass
class VerifiedState:
  """The loop's carry.

  Attributes:
    positions: tokens that each row has generated, [batch].
    current: each row's last token or draft, which is read next, [batch].
    active: rows that still generate, [batch] bool.
    generation: filled up to `positions`.
    log_probabilities: of the emitted tokens, [batch, length].
    ahead: tokens that its passes emitted beyond one each, [batch].
    odds: how often drafts were accepted.
    idle: drafting passes since the last one that emitted two tokens of any row, [].
    waits: passes before the next one that drafts, [].
    cost: what passes took besides one step of the full model each, in such steps, [].
    planned: until when the next pass drafts.
    drafted: by the pass so far; in the room of the one before, for to make room takes longer.
    cache: every layer's.
  """

  positions: Int[Array, " batch"]
  current: Int[Array, " batch"]
  active: Bool[Array, " batch"]
  generation: loop.Generation
  log_probabilities: Float[Array, "batch length"]
  ahead: Int[Array, " batch"]
  odds: drafting.Odds
  idle: Int[Array, ""]
  waits: Int[Array, ""]
  cost: Float[Array, ""]
  planned: drafting.Planned
  drafted: Drafted
  cache: Any


class Passes(Protocol):
  """What the loop asks of a decoder. Rows have `positions` [batch] of their own."""

  @property
  def num_layers(self) -> int:
    """L."""
    ...

  @property
  def shortens(self) -> bool:
    """Whether a pass may have one position (`verify_one`), or always has the whole window."""
    ...

  def empty(self) -> Any:
    """Caches that hold nothing yet."""
    ...

  def room(self, batch_size: int) -> Any:
    """Room for what is kept of the positions of a pass (`Drafted.work`), zeros."""
    ...

  def read(self, cache: Any, token: jax.Array, positions: jax.Array) -> tuple[Any, Any]:
    """Layers 1 ... k on `token` [batch]: what the other layers go on from, and the caches."""
    ...

  def look(self, read: Any) -> exits.verified.Draft:
    """What the draft head says of a position that was read, [batch]."""
    ...

  def keep(self, work: Any, read: Any, at: jax.Array) -> Any:
    """`work` with the pass's position `at` [], which was read."""
    ...

  def verify(
    self, cache: Any, positions: jax.Array, drafted: Drafted, made: jax.Array, threshold: Any
  ) -> tuple[exits.verified.Verdict, Any]:
    """The other layers and the head over the window of a pass that begins at `positions`;
    `made` [window] says which have a draft: the verdict [batch, window], and the caches."""
    ...

  def verify_one(
    self, cache: Any, positions: jax.Array, read: Any
  ) -> tuple[layers.Greedy, Callable[[jax.Array], jax.Array], Any]:
    """The same of one position, [batch], that was read: what the full model says there, how
    far the logit of a token is above that one's, and the caches."""
    ...

  def step(
    self, current: jax.Array, position: jax.Array, active: jax.Array, cache: Any
  ) -> tuple[exits.TokenExit, Any]:
    """One token at full depth of rows that are all at `position` []: a `loop.Step`."""
    ...
