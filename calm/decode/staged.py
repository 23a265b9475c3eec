"""Long limits in stages: a text costs what its own length costs, whatever its limit is.

A step's attention reads every position of the caches, filled or not. So a first program has 64
positions, and where some row goes on, the next one has four times as many, up to the limit.
"""

import dataclasses
from typing import TypeVar

import jax
import numpy as np

from calm.decode import acceptance, engines, loop
from calm.decode.program import ModelWeights, Program
from calm.t5 import caches, platforms

Decodes = TypeVar("Decodes")

# Positions of the first stage, and how many times as many the next one has.
FIRST, RATIO = 64, 4


def lengths(max_decode_length: int) -> tuple[int, ...]:
  """Positions of every stage, ascending; the last has those of the limit.

  A stage that would hold more than half of the limit is left out: it saves little.
  """
  stages, length = [], FIRST
  while 2 * length <= max_decode_length:
    stages.append(length)
    length *= RATIO
  return (*stages, max_decode_length)


@dataclasses.dataclass(frozen=True)
class StagedProgram:
  """A `Program` whose limit is reached in stages."""

  program: Program

  @property
  def stages(self) -> tuple[Program, ...]:
    """Of which a text runs as many as it needs."""
    rooms = lengths(self.program.max_decode_length)
    return tuple(dataclasses.replace(self.program, room=room) for room in rooms)

  def decode(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: jax.Array | np.ndarray,
    threshold: jax.Array | np.ndarray,
    prior: acceptance.Prior | None = None,
  ) -> loop.Generation:
    """As `Program.decode`."""
    first, *others = self.stages
    state = first.begin(weights, encoded, active, threshold, prior)
    for stage in others:
      if not np.any(state.active):
        break
      state = stage.go_on(weights, encoded, state, threshold)
    return state.generation

  def nothing_yet(self, batch_size: int) -> loop.DecodingState:
    """As `Program.nothing_yet`, with the first stage's caches."""
    return self.stages[0].nothing_yet(batch_size)

  def resume(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    state: loop.DecodingState,
    active: jax.Array | np.ndarray,
    threshold: jax.Array | np.ndarray,
    resume_at: jax.Array | np.ndarray,
  ) -> loop.DecodingState:
    """As `Program.resume`, in the stage that `state` has reached and those that rows need."""
    reached = caches.length(state.cache)
    for stage in (stage for stage in self.stages if stage.length >= reached):
      if stage.length > caches.length(state.cache):
        state = dataclasses.replace(state, cache=engines.grown(state.cache, stage.length))
      state = stage.resume(weights, encoded, state, active, threshold, resume_at)
      active = np.asarray(state.active)
      if not active.any():
        break
      # Rows that have not ended go on where the stage did.
      resume_at = np.maximum(resume_at, stage.length).astype(np.int32)
    return state


def staged(program: Decodes) -> Decodes | StagedProgram:
  """The program in stages, on a CPU, where its limit is long enough for two of them.

  Devices that have rows of their own end their own loops: they have one program.
  """
  if not isinstance(program, Program):
    return program
  one = len(lengths(program.max_decode_length)) == 1
  return program if one or not platforms.grows_caches() else StagedProgram(program)
