"""Whether the output head is read in 8 bits: as measured at full depth, a prompt at a time."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt
from calm.exits import schedules
from calm.paper.bench import decode

# Heads of fewer numbers are read in no time; prompts that are timed, how often each, and how
# much faster 8 bits must be to be taken.
LEAST_NUMBERS = 2**20
PROMPTS, ROUNDS, MARGIN = 8, 3, 1.05


@dataclasses.dataclass(frozen=True)
class Heads:
  """Full depth with either head.

  Attributes:
    stored, narrow: milliseconds a prompt with the head as it is stored and in 8 bits, the mean
      over prompts of their medians; NaN where nothing was timed.
    num_prompts: prompts that were timed.
  """

  stored: float
  narrow: float
  num_prompts: int

  @property
  def speedup(self) -> float:
    """The stored head's time over that in 8 bits; NaN where nothing was timed."""
    return self.stored / self.narrow

  @property
  def pays(self) -> bool:
    """Whether 8 bits are taken."""
    return self.speedup > MARGIN

  def __str__(self) -> str:
    told = "read in 8 bits" if self.pays else "read as it is stored"
    return (
      f"Output head: {told}; in 8 bits full depth is x{self.speedup:.2f} as fast"
      f" ({self.stored:.1f} -> {self.narrow:.1f} ms a prompt, {self.num_prompts} prompts)."
    )


def nothing_to_gain(predictor: inference.Predictor) -> bool:
  """Whether a head is not worth timing: it is small, or is read in 8 bits already."""
  small = predictor.vocabulary.vocab_size * predictor.config.emb_dim < LEAST_NUMBERS
  return small or predictor.options.head_dtype is not None


def measure(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  progress: Callable[[float, str], None],
) -> Heads:
  """Times full depth with both heads, prompt by prompt and in turn.

  Args:
    predictor: the model.
    prompts: so many of the commonest length are decoded as are needed.
    progress: told of the share done.
  """
  stored = predictor.with_options(batch_size=1)
  models = (stored, stored.with_options(head_dtype="int8"))
  chosen = decode.of_one_length(predictor, prompts, PROMPTS)
  seconds = np.zeros((len(models), len(chosen), ROUNDS))
  for number, batch in enumerate(stored.plan([prompt.input for prompt in chosen])):
    encoded = stored.encode(batch)
    for turn in range(-1, ROUNDS):  # the first compiles, or fetches, and does not count
      for which in (0, 1) if turn % 2 else (1, 0):
        start = time.perf_counter()
        made = models[which].decode(
          encoded, batch.active, schedules.NEVER_EXIT, exits.StaticExit()
        )
        jax.block_until_ready(made.tokens)
        if turn >= 0:
          seconds[which, number, turn] = time.perf_counter() - start
    progress((number + 1) / len(chosen), "heads timed")
  means = 1e3 * np.median(seconds, axis=2).mean(axis=1)
  return Heads(float(means[0]), float(means[1]), len(chosen))
