"""How weights are read, as measured at full depth, a prompt at a time: the output head in 8
bits, the decoder's matrices in columns."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt
from calm.exits import schedules
from calm.inference import offline
from calm.t5 import columns

# Heads of fewer numbers are read in no time; prompts that are timed, how often each, and how
# much faster another way must be to be taken.
LEAST_NUMBERS = 2**20
PROMPTS, ROUNDS, MARGIN = 8, 3, 1.05


@dataclasses.dataclass(frozen=True)
class Way:
  """An option under which weights are read in another way.

  Attributes:
    value: the option's.
    subject: what is read.
    taken, left: how it is read with the option and without.
    short: the option, in a sentence about seconds.
  """

  value: str
  subject: str
  taken: str
  left: str
  short: str


# By the name of the option, in the order in which they are tried, each on top of the last.
WAYS: Mapping[str, Way] = {
  "head_dtype": Way(
    "int8", "Output head", "read in 8 bits", "read as it is stored", "in 8 bits"
  ),
  "weights_layout": Way("columns", "Layers' matrices", "cut into columns", "whole", "cut"),
}


@dataclasses.dataclass(frozen=True)
class Reading:
  """Full depth with weights read either way.

  Attributes:
    option: a key of `WAYS`.
    stored, other: milliseconds a prompt without the option and with it, the mean over prompts
      of their medians; NaN where nothing was timed.
    num_prompts: prompts that were timed.
  """

  option: str
  stored: float
  other: float
  num_prompts: int

  @property
  def speedup(self) -> float:
    """The time without the option over that with it; NaN where nothing was timed."""
    return self.stored / self.other

  @property
  def pays(self) -> bool:
    """Whether the option is taken."""
    return self.speedup > MARGIN

  def __str__(self) -> str:
    way = WAYS[self.option]
    return (
      f"{way.subject}: {way.taken if self.pays else way.left}; {way.short} full depth is"
      f" x{self.speedup:.2f} as fast ({self.stored:.1f} -> {self.other:.1f} ms a prompt,"
      f" {self.num_prompts} prompts)."
    )


def nothing_to_gain(predictor: inference.Predictor, option: str) -> bool:
  """Whether an option is not worth timing: what it reads is small, or it is taken already."""
  config = predictor.config
  if option == "head_dtype":
    small = predictor.vocabulary.vocab_size * config.emb_dim < LEAST_NUMBERS
  else:
    widest = max(config.num_heads * config.head_dim, config.mlp_dim)
    small = not columns.is_cut(config.emb_dim, widest)
    # Matrices in 8 bits are not cut.
    small = small or predictor.options.weights_dtype == inference.options.IN_8_BITS
  return small or getattr(predictor.options, option) is not None


def to_try(predictor: inference.Predictor) -> list[str]:
  """The options that are worth timing."""
  return [option for option in WAYS if not nothing_to_gain(predictor, option)]


def with_option(predictor: inference.Predictor, option: str) -> inference.Predictor:
  """The model with its weights read in the other way; its tokens are the same."""
  return predictor.with_options(**{option: WAYS[option].value})


def measure(
  predictor: inference.Predictor,
  option: str,
  prompts: Sequence[Prompt],
  progress: Callable[[float, str], None],
) -> Reading:
  """Times full depth without the option and with it, prompt by prompt and in turn.

  Args:
    predictor: the model.
    option: a key of `WAYS`.
    prompts: so many of the commonest length are decoded as are needed.
    progress: told of the share done.
  """
  stored = predictor.with_options(batch_size=1)
  models = (stored, with_option(stored, option))
  chosen = offline.of_one_length(predictor, prompts, PROMPTS)
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
    progress((number + 1) / len(chosen), "prompts timed")
  means = 1e3 * np.median(seconds, axis=2).mean(axis=1)
  return Reading(option, float(means[0]), float(means[1]), len(chosen))
