"""The mean of the worst texts (expected shortfall, CVaR) is bounded."""

import dataclasses
from typing import ClassVar

import numpy as np

from calm.calibrate.losses import Support
from calm.calibrate.promises.promise import Part, Promise, Test, in_range, transformed


@dataclasses.dataclass(frozen=True)
class TailMean(Promise):
  """CVaR_beta(loss) <= tolerance: the mean over the worst share 1 - beta of texts.

      Z = start + max(0, loss - start) / (1 - beta),   E[Z] <= tolerance

  CVaR is at most E[Z] for every start (Rockafellar and Uryasev 2000), so any start that was
  fixed before these losses were seen is valid; the best is the beta-quantile of losses, to be
  taken from validation prompts. It must be below the tolerance.

  Attributes:
    beta: share of texts that are not counted, in (0, 1).
    start: where the tail begins, in the unit of the loss.
    name: in files and on the command line.
  """

  beta: float = 0.9
  start: float = 0.0
  name: ClassVar[str] = "tail_mean"

  def __post_init__(self):
    object.__setattr__(self, "beta", in_range("beta", self.beta, 0.0, 1.0))
    object.__setattr__(self, "start", in_range("start", self.start, -2.0, 1.0))

  def tests(self, tolerance, support):
    """Losses beyond the start, magnified."""
    if not max(self.start, support.lower) < tolerance:
      raise ValueError(
        f"Expected `start` below the tolerance {tolerance}, got {self.start}; no tail mean can"
        " be certified to lie below where the tail begins."
      )
    low, high = self._of(np.array([support.lower, support.upper])).tolist()
    return (Test("", tolerance, Support(low, high)),)

  def parts(self, losses, tolerance):
    """Losses beyond the start, magnified."""
    (test,) = self.tests(tolerance, losses.support)
    return (Part("", transformed(losses, self._of(losses.values), test.support), tolerance),)

  def _of(self, values: np.ndarray) -> np.ndarray:
    return self.start + np.maximum(0.0, values - self.start) / (1.0 - self.beta)

  def statement(self, calibration, loss):
    """A mean over the worst."""
    worst = 100.0 * (1.0 - self.beta)
    return (
      f"a mean {loss} over the worst {worst:.10g} % of texts of at most"
      f" {calibration.tolerance:.10g}"
    )

  def limits(self, unit):
    """Nothing of single texts."""
    return (
      f"This is a mean over the worst texts among {unit} drawn like those: it says nothing of"
      " any single prompt, nor of prompts of another kind, and holds if the start of the tail"
      f" ({self.start:.10g}) was fixed before these losses were seen."
    )
