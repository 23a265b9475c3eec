"""The mean over another, known mixture of the same prompts."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from calm import arguments
from calm.calibrate import checks
from calm.calibrate.losses import Support
from calm.calibrate.promises.promise import Part, Promise, Test, rows_of, transformed


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class KnownMixture(Promise):
  """E_Q[loss] <= tolerance, for a mixture Q other than that of the calibration prompts P.

      Z = tolerance + w (loss - tolerance),   w = dQ / dP <= most,   E_P[Z] = E_Q[loss]

  since E_P[w] = 1. A bet of nu on Z is the factor 1 + nu w (tolerance - loss). Weights must be
  known, not estimated: shares of tasks at serving over shares in the calibration population.
  (Almeida et al., PMLR 266, 2025.)

  Attributes:
    most: declared upper bound of weights, at least 1.
    weights: [num_examples] w of each prompt.
    name: in files and on the command line.
  """

  most: float = 1.0
  weights: Any = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "known_mixture"

  def __post_init__(self):
    if not (np.isfinite(self.most) and self.most >= 1.0):
      raise ValueError(
        f"Expected `most` of at least 1 (weights have mean 1), got {self.most!r}."
      )
    object.__setattr__(self, "most", float(self.most))
    if self.weights is not None:
      weights = checks.as_numbers(self.weights, "weights")
      object.__setattr__(self, "weights", weights)
      if not np.all((weights >= 0.0) & (weights <= self.most)):
        raise ValueError(
          f"Expected `weights` in [0, `most`] = [0, {self.most}], got"
          f" {float(weights.min())} to {float(weights.max())}."
        )

  def tests(self, tolerance, support):
    """Weighted differences from the tolerance."""
    low = tolerance + self.most * (support.lower - tolerance)
    return (
      Test("", tolerance, Support(low, tolerance + self.most * (support.upper - tolerance))),
    )

  def parts(self, losses, tolerance):
    """Weighted differences from the tolerance."""
    weights = rows_of(self.weights, losses, "weights", table=False)[:, None]
    (test,) = self.tests(tolerance, losses.support)
    values = tolerance + weights * (losses.values - tolerance)
    return (Part("", transformed(losses, values, test.support), tolerance),)

  def statement(self, calibration, loss):
    """An expected loss over the other mixture."""
    return (
      f"an expected {loss} of at most {calibration.tolerance:.10g} over the mixture that the"
      f" caller's weights (at most {self.most:.10g}) describe"
    )

  def limits(self, unit):
    """Nothing of yet another mixture; and the weights are the caller's word."""
    return (
      f"This is a mean over {unit} weighted so: it says nothing of any single prompt nor of"
      " another mixture, and nothing at all if the weights were estimated."
    )
