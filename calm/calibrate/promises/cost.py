"""The risk is kept, and it is cheaper by a stated factor."""

import dataclasses
from typing import Any, ClassVar

from calm import arguments
from calm.calibrate.losses import Support
from calm.calibrate.promises.promise import (
  Part,
  Promise,
  Test,
  in_range,
  rows_of,
  transformed,
)


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Cost(Promise):
  """E[loss] <= tolerance and E[cost / full cost] <= at_most.

      Z = cost of the early text / cost of the same at full depth, in [0, 1]

  Losses rise and costs fall along the grid, so the two are tested from opposite ends: the risk
  from the highest threshold down at (1 - share) of the error rate, the cost from the lowest up
  at `share` of it. A threshold that both certify keeps both (union bound).

  Attributes:
    at_most: bound on the mean ratio, in (0, 1); 1 / 1.5 for "at least 1.5 times fewer".
    share: of the error rate that the cost may use.
    unit: what is counted, in words.
    costs: [num_examples, num_thresholds] ratio of each text, in [0, 1].
    name: in files and on the command line.
  """

  at_most: float = 0.5
  share: float = 0.5
  unit: str = "decoder layers a token"
  costs: Any = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "cost"

  def __post_init__(self):
    object.__setattr__(self, "at_most", in_range("at_most", self.at_most, 0.0, 1.0))
    object.__setattr__(self, "share", in_range("share", self.share, 0.0, 1.0))

  def tests(self, tolerance, support):
    """The losses, and the ratio of costs."""
    return (
      Test("risk", tolerance, support, 1.0 - self.share),
      Test("cost", self.at_most, Support(), self.share),
    )

  def parts(self, losses, tolerance):
    """The losses, and the ratio of costs."""
    costs = rows_of(self.costs, losses, "costs", table=True)
    return (
      Part("risk", losses, tolerance, share=1.0 - self.share),
      Part(
        "cost",
        transformed(losses, costs, Support()),
        self.at_most,
        share=self.share,
        ascending=True,
      ),
    )

  def statement(self, calibration, loss):
    """A bound on the loss and one on the cost."""
    return (
      f"an expected {loss} of at most {calibration.tolerance:.10g}, and needs at most"
      f" {self.at_most:.10g} of the {self.unit} of full depth (at least"
      f" x{1.0 / self.at_most:.4g} fewer), on average over texts"
    )

  def limits(self, unit):
    """Counts are no seconds."""
    return (
      f"These are means over {unit} drawn like those: they say nothing of any single prompt,"
      " nor of prompts of another kind, and nothing of seconds, which the machine decides."
    )
