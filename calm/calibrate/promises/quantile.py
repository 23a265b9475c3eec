"""A share of all texts loses at most delta each."""

import dataclasses
from typing import ClassVar

import numpy as np

from calm.calibrate.losses import Support
from calm.calibrate.promises.promise import Part, Promise, Test, in_range, transformed


@dataclasses.dataclass(frozen=True)
class Quantile(Promise):
  """P(loss <= tolerance) >= share.

      Z = 1{loss > tolerance},   E[Z] <= 1 - share

  Z is binary, so the test is the exact binomial one. The fewest prompts that can certify it are
  log(error_rate) / log(share): 29, 59 and 299 for 0.9, 0.95 and 0.99 at 0.05.

  Attributes:
    share: of texts, in (0, 1).
    name: in files and on the command line.
  """

  share: float = 0.95
  name: ClassVar[str] = "quantile"

  def __post_init__(self):
    object.__setattr__(self, "share", in_range("share", self.share, 0.0, 1.0))

  def tests(self, tolerance, support):
    """Losses above the tolerance, counted."""
    # 1 - 0.9 is 0.09999999999999998, which would ask for one prompt more.
    return (Test("", round(1.0 - self.share, 12), Support(binary=True)),)

  def parts(self, losses, tolerance):
    """Losses above the tolerance, counted; NaN stays NaN, and no threshold with it passes."""
    values = np.where(np.isnan(losses.values), np.nan, losses.values > tolerance)
    outside = (losses.values < losses.support.lower - 1e-9) | (
      losses.values > losses.support.upper + 1e-9
    )
    (test,) = self.tests(tolerance, losses.support)
    counted = transformed(losses, np.where(outside, np.nan, values), test.support)
    return (Part("", counted, test.tolerance),)

  def statement(self, calibration, loss):
    """A share of texts, each within the tolerance."""
    share = 100.0 * self.share
    return (
      f"a {loss} of at most {calibration.tolerance:.10g} for at least {share:.10g} % of texts"
    )

  def limits(self, unit):
    """Nothing of how bad the others are."""
    return (
      f"This is a share over {unit} drawn like those: it says nothing of how much the others"
      " lose, nor which they are, nor of prompts of another kind."
    )
