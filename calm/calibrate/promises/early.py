"""The texts that really left early keep the tolerance, not only all texts on average."""

import dataclasses
import math
from typing import Any, ClassVar

from calm import arguments
from calm.calibrate.promises.promise import Part, Promise, Test, rows_of


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class EarlyExits(Promise):
  """E[loss | depth <= t] <= tolerance for every t of a fixed grid.

      p = max over t of p on the prompts whose depth at that threshold is at most t

  A mean over all texts may hide that those that leave early are bad, because many never leave
  and lose nothing. Given that their depth is at most t, prompts are independent draws from that
  event, so the test on them is valid (Ringel et al., arXiv 2402.00857; with one grid fixed
  beforehand no second stage is needed). Where no prompt is so early, nothing is certified.

  Attributes:
    limits_of_depth: grid of t, in the unit of `depths`, fixed before any depth was seen.
    depths: [num_examples, num_thresholds] depth of each text, such as layers a token; finite
      and at least 0.
    name: in files and on the command line.
  """

  limits_of_depth: tuple[float, ...] = ()
  depths: Any = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "early_exits"

  def __post_init__(self):
    limits = tuple(map(float, self.limits_of_depth))
    rise = all(0 < limit < math.inf for limit in limits) and sorted(set(limits)) == list(limits)
    if not limits or not rise:
      raise ValueError(
        "Expected `limits_of_depth` to be finite, above 0 and to rise strictly, got"
        f" {self.limits_of_depth!r}."
      )
    object.__setattr__(self, "limits_of_depth", limits)

  def tests(self, tolerance, support):
    """The losses of texts within each limit."""
    return tuple(
      Test(f"depth <= {limit:g}", tolerance, support) for limit in self.limits_of_depth
    )

  def parts(self, losses, tolerance):
    """The losses of texts within each limit."""
    depths = rows_of(self.depths, losses, "depths", table=True)
    return tuple(
      Part(f"depth <= {limit:g}", losses, tolerance, depths <= limit)
      for limit in self.limits_of_depth
    )

  def statement(self, calibration, loss):
    """An expected loss among early texts."""
    limits = ", ".join(f"{limit:g}" for limit in self.limits_of_depth)
    return (
      f"an expected {loss} of at most {calibration.tolerance:.10g} among texts of mean depth at"
      f" most t, for each t of {limits}"
    )

  def limits(self, unit):
    """Nothing of other depths."""
    return (
      f"These are means over the early texts of {unit} drawn like those: they say nothing of"
      " any single prompt, of other depths, nor of prompts of another kind."
    )
