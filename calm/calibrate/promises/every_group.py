"""Every group of prompts (language, length, task) keeps the tolerance, not only their mean."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from calm import arguments
from calm.calibrate import checks
from calm.calibrate.losses import SequenceLosses
from calm.calibrate.promises.promise import (
  Part,
  Promise,
  Test,
  in_range,
  names_of,
  rows_of,
)


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class EveryGroup(Promise):
  """E[loss | group] <= tolerance in every group.

      p = max over groups of p on the prompts of that group

  There is no charge for the number of groups, but each needs prompts enough of its own. Groups
  are those that the calibration prompts have; of any other nothing is said.

  Attributes:
    groups: names, sorted; made of `labels`.
    labels: [num_examples] group of each prompt.
    name: in files and on the command line.
  """

  groups: tuple[str, ...] = ()
  labels: Sequence[Any] | None = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "every_group"

  def __post_init__(self):
    if self.labels is not None:
      object.__setattr__(self, "groups", names_of(self.labels))
    if not self.groups:
      raise ValueError("Expected `labels` to name at least one group, got none.")
    checks.check_lines(self.groups, "labels")

  def tests(self, tolerance, support):
    """The losses of each group."""
    return tuple(Test(group, tolerance, support) for group in self.groups)

  def parts(self, losses, tolerance):
    """The losses of each group."""
    labels = rows_of(self.labels, losses, "labels", table=False)
    shape = losses.values.shape
    return tuple(
      Part(group, losses, tolerance, np.broadcast_to((labels == group)[:, None], shape))
      for group in self.groups
    )

  def statement(self, calibration, loss):
    """An expected loss in each of the groups, named."""
    groups = ", ".join(repr(group) for group in self.groups[:12])
    rest = f" and {len(self.groups) - 12} more" if len(self.groups) > 12 else ""
    return (
      f"an expected {loss} of at most {calibration.tolerance:.10g} in each of the groups"
      f" {groups}{rest}"
    )

  def limits(self, unit):
    """Nothing of groups that were not there."""
    return (
      f"These are means over the {unit} of each group, drawn like those: they say nothing of"
      " any single prompt, nor of a group that is not named."
    )


@arguments.checked()
def each_group(
  losses: SequenceLosses, labels: Sequence[Any], *, error_rate: float, **options: Any
) -> dict[str, Any]:
  """A threshold for each group, served by group; all their promises hold at once.

  Each group is calibrated by itself at error_rate / (number of groups) (Bonferroni), so that
  with probability at least 1 - error_rate no group exceeds its tolerance. The group must be
  known when a prompt is served.

  Args:
    losses: as for `calibrate`, `SequenceLosses`.
    labels: [num_examples] group of each prompt.
    error_rate: epsilon for all groups together.
    options: as for `calibrate`.

  Returns:
    {group: `Calibration`}, groups sorted.

  Raises:
    ValueError: as `calibrate`.
  """
  from calm.calibrate.certify import calibrate

  in_range("error_rate", error_rate, 0.0, 1.0)
  names = names_of(labels)
  column = rows_of(np.asarray(labels), losses, "labels", table=False)
  return {
    name: calibrate(
      losses.rows(np.flatnonzero(column == name)),
      error_rate=error_rate / len(names),
      **options,
    )
    for name in names
  }
