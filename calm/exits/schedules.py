"""Threshold schedules: from the calibrated lambda to each token's own
threshold.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from calm import arguments

# "Never exit" is a value of its own: float32 margins do reach 1.0.
NEVER_EXIT = math.inf


@runtime_checkable
class Schedule(Protocol):
  """(threshold, number of tokens generated before this one) -> threshold of
  this token.
  """

  name: ClassVar[str]

  def __call__(
    self, threshold: jax.Array, generated: jax.Array
  ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Constant:
  """lambda itself for every token."""

  name: ClassVar[str] = "constant"

  def __call__(self, threshold, generated):
    del generated
    return threshold


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Decaying:
  """Eq. 5: clip_[0,1](0.9 lambda + 0.1 exp(-temperature * t / max_length)); inf
  stays inf.

  Attributes:
    temperature: the paper's tau, >= 0.
    max_length: N, fixed here and never read off an array.
  """

  temperature: float
  max_length: int
  name: ClassVar[str] = "decaying"

  def __post_init__(self):
    if not (0 <= self.temperature < math.inf and self.max_length >= 1):
      raise ValueError(
        "Expected `temperature` >= 0 and a whole `max_length` >= 1, both "
        "finite,"
        f" got {self.temperature!r} and {self.max_length!r}; Eq. 5's figures "
        "have 0 to 8."
      )

  def __call__(self, threshold, generated):
    elapsed = jnp.asarray(generated, jnp.float32) / self.max_length
    decay = 0.1 * jnp.exp(-self.temperature * elapsed)
    clipped = jnp.clip(0.9 * threshold + decay, 0.0, 1.0)
    # Before any clipping could turn "never" into 1.0, which saturated margins
    # do reach.
    return jnp.where(jnp.isinf(threshold), threshold, clipped)


@arguments.checked()
def schedule(name: str, **options: Any) -> Schedule:
  """`constant`, or `decaying` with its `temperature` and `max_length`, by name.

  Raises:
    ValueError: there is no such schedule, or its numbers are missing or out of
      range.
  """
  kinds: Mapping[str, Any] = {Constant.name: Constant, Decaying.name: Decaying}
  kind = kinds[arguments.one_of("schedule", name, kinds)]
  try:
    return kind(**options)
  except TypeError as error:
    raise ValueError(
      f"Expected `schedule` to be a name and its numbers, got {name!r} with "
      f"{options}"
      f" ({error}); give `schedules.Decaying(temperature, max_length)`."
    ) from error
