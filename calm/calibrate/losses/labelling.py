"""Losses of which only some were labelled, with known probability: as good as all of them.

    Z = f + (xi / pi) (L - f),   xi ~ Bernoulli(pi),   E[Z] = E[L]

L is the loss by the costly label (a reference, a judge), f a prediction of it that costs
nothing (the textual loss, a cheap judge) and may be as wrong as it likes: a bad one costs
power, never validity, at any number of prompts (arXiv 2502.04294). Whether a prompt is labelled
must be drawn before its loss is known, with the probability that is then declared.
"""

import dataclasses
from typing import Any

import numpy as np

from calm.calibrate.losses import checks
from calm.calibrate.losses.sequence_losses import SequenceLosses, Support


def choose(num_examples: int, probability: Any, *, seed: int) -> np.ndarray:
  """Which prompts are to be labelled.

  Args:
    num_examples: prompts.
    probability: of being labelled, in (0, 1]; a number or one a prompt.
    seed: recorded by the caller, and not chosen by its outcome.

  Returns:
    [num_examples] bool.

  Raises:
    ValueError: a probability leaves its range.
  """
  shares = _probabilities(probability, num_examples)
  return np.random.default_rng(seed).random(num_examples) < shares


def with_predictions(
  labelled: SequenceLosses, predicted: Any, chosen: Any, probability: Any
) -> SequenceLosses:
  """Losses of all prompts, from labels of some and predictions of all.

  Args:
    labelled: losses; rows that were not chosen are not read (NaN will do).
    predicted: [num_examples, num_thresholds] predictions in the range of the losses.
    chosen: [num_examples] bool, which rows were labelled (`choose`).
    probability: with which each was, in (0, 1]; a number or one a prompt.

  Returns:
    `SequenceLosses` of the same mean, in the wider range [upper - w, lower + w] with w the old
    width over the least probability.

  Raises:
    ValueError: shapes differ, a probability is not in (0, 1], or a prediction leaves the range.
  """
  values, low, high = labelled.values, labelled.support.lower, labelled.support.upper
  guess = checks.as_numbers(predicted, "predicted")
  mask = np.asarray(chosen)
  if guess.shape != values.shape or mask.shape != values.shape[:1] or mask.dtype != bool:
    raise ValueError(
      f"Expected `predicted` of shape {values.shape} and `chosen` of {values.shape[:1]} flags,"
      f" got {guess.shape} and {mask.shape} of {mask.dtype}."
    )
  if not np.all((guess >= low) & (guess <= high)):
    raise ValueError(
      f"Expected `predicted` in the range of losses [{low}, {high}], got others."
    )
  shares = _probabilities(probability, len(values))
  known = np.where(mask[:, None], values, guess)
  found = guess + (known - guess) / shares[:, None]
  width = (high - low) / float(shares.min())
  support = Support(high - width, low + width, binary=labelled.support.binary and width == 1.0)
  return dataclasses.replace(labelled, values=found, support=support)


def _probabilities(probability: Any, count: int) -> np.ndarray:
  shares = np.broadcast_to(checks.as_numbers(probability, "probability"), (count,))
  if not np.all((shares > 0.0) & (shares <= 1.0)):
    raise ValueError(
      f"Expected `probability` in (0, 1], got {float(shares.min())} to {float(shares.max())}; a"
      " prompt that can never be labelled is not known."
    )
  return shares
