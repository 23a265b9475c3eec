"""Long limits in stages: a text costs what its own length costs, whatever its limit is.

A step's attention reads every position of the caches, filled or not. So a first program has 64
positions, and where some row goes on, the next one has four times as many, up to the limit.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from calm import exits
from calm.decode import acceptance, compiled, engines, loop, speculative
from calm.decode import program as program_lib
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


State = loop.DecodingState | speculative.SpeculativeState


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage's program; compiled once for every batch shape.

  Passes over drafts that begin in a stage may end in the next one's positions: caches have room
  for that.

  Attributes:
    program: what is decoded; its limit is the last stage's.
    length: positions of this stage's caches.
  """

  program: program_lib.Program
  length: int

  @compiled.method()
  def begin(
    self,
    weights: program_lib.ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
    prior: acceptance.Prior | None = None,
  ) -> State:
    """Decodes from the first token on, up to this stage's length."""
    if isinstance(self.program.rule, exits.Speculative):
      made = self._speculation(weights, encoded, threshold, prior)
      return made.finish(made.go_on(made.begin(active), self.length))
    bound = self.cut().bind(weights.decoder, encoded, threshold)
    return loop.decode(
      bound.take_step,
      bound.empty,
      active=active,
      max_decode_length=self.program.max_decode_length,
      step_limit=jnp.asarray(self.length, jnp.int32),
      eos_id=self.program.eos_id,
    )

  @compiled.method()
  def go_on(
    self,
    weights: program_lib.ModelWeights,
    encoded: caches.Encoded,
    state: State,
    threshold: Float[Array, "..."],
  ) -> State:
    """Decodes the rows that a shorter stage has not ended, up to this one's length."""
    if isinstance(state, speculative.SpeculativeState):
      made = self._speculation(weights, encoded, threshold)
      room = speculative.cache_length(made.rule, self.length)
      state = dataclasses.replace(state, cache=engines.grown(state.cache, room))
      return made.finish(made.go_on(state, self.length))
    bound = self.cut().bind(weights.decoder, encoded, threshold)
    return loop.go_on(
      bound.take_step,
      state,
      bound.grow(state.cache),
      step_limit=self.length,
      eos_id=self.program.eos_id,
    )

  def cut(self) -> program_lib.Program:
    """The program with this stage's limit."""
    return dataclasses.replace(self.program, max_decode_length=self.length)

  def _speculation(self, weights, encoded, threshold, prior=None) -> speculative.Speculation:
    made = self.cut().speculation(weights, encoded, threshold, prior)
    return dataclasses.replace(made, length=self.program.max_decode_length)


@dataclasses.dataclass(frozen=True)
class StagedProgram:
  """A `program.Program` whose limit is reached in stages.

  Attributes:
    program: what is decoded.
  """

  program: program_lib.Program

  def decode(
    self,
    weights: program_lib.ModelWeights,
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
    return self.program.nothing_yet(batch_size, self.stages[0].length)

  def resume(
    self,
    weights: program_lib.ModelWeights,
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
      state = stage.cut().resume(weights, encoded, state, active, threshold, resume_at)
      active = np.asarray(state.active)
      if not active.any():
        break
      # Rows that have not ended go on where the stage did.
      resume_at = np.maximum(resume_at, stage.length).astype(np.int32)
    return state

  @property
  def stages(self) -> tuple[Stage, ...]:
    """Of which a text runs as many as it needs."""
    return tuple(Stage(self.program, n) for n in lengths(self.program.max_decode_length))


def staged(program: Decodes) -> Decodes | StagedProgram:
  """The program in stages, on a CPU, where its limit is long enough for two of them.

  Devices that have rows of their own end their own loops: they have one program.
  """
  if not isinstance(program, program_lib.Program):
    return program
  one = len(lengths(program.max_decode_length)) == 1
  return program if one or not platforms.grows_caches() else StagedProgram(program)
