"""The paper's promise: the mean loss is at most delta."""

import dataclasses
from typing import ClassVar

from calm.calibrate.promises.promise import Part, Promise, Test


@dataclasses.dataclass(frozen=True)
class Mean(Promise):
  """E[loss] <= tolerance, over all prompts (paper, Definitions 1 and 2)."""

  name: ClassVar[str] = "mean"

  def tests(self, tolerance, support):
    """The losses as they are."""
    return (Test("", tolerance, support),)

  def parts(self, losses, tolerance):
    """The losses as they are."""
    return (Part("", losses, tolerance),)

  def statement(self, calibration, loss):
    """An expected loss."""
    return f"an expected {loss} of at most {calibration.tolerance:.10g}"
