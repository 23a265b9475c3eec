"""One of many configurations, with several risks each within its own tolerance."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from calm.calibrate import checks
from calm.calibrate.promises.risks import SeveralRisks


@dataclasses.dataclass(frozen=True)
class Configurations(SeveralRisks):
  """E[loss of risk r] <= tolerance of r, for every r, of one configuration among many.

  Rows are configurations in the order in which they were tested, which other prompts gave; the
  cheapest certified one is served. Made by `configurations.calibrate_configurations`.

  Attributes:
    configurations: names, in the tested order.
    costs: of the configurations, by the prompts that gave the order.
    name: in files and on the command line.
  """

  configurations: tuple[str, ...] = ()
  costs: tuple[float, ...] = ()
  name: ClassVar[str] = "configurations"

  def __post_init__(self):
    super().__post_init__()
    if not self.configurations or len(self.configurations) != len(self.costs):
      raise ValueError(
        "Expected `configurations` with a cost each, got"
        f" {len(self.configurations)} and {len(self.costs)} costs."
      )
    checks.check_lines(self.configurations, "configurations")
    if not np.isfinite(self.costs).all():
      raise ValueError(f"Expected finite `costs`, got {self.costs!r:.200}.")

  def place(self, rejected: Any) -> int | None:
    """The cheapest certified configuration; of equal ones the safest."""
    (certified,) = np.nonzero(rejected)
    if not len(certified):
      return None
    return int(certified[np.argmin(np.asarray(self.costs)[certified])])

  def check_rows(self, thresholds):
    """A row a configuration."""
    if len(thresholds) != len(self.configurations):
      raise ValueError(
        f"Expected {len(self.configurations)} `rows`, one a configuration, got"
        f" {len(thresholds)}."
      )

  def reason(self, rejected: Any) -> str:
    """Why this configuration is served."""
    place, count = self.place(rejected), int(np.sum(rejected))
    if place is None:
      return f"Nothing is certified: the safest, {self.configurations[0]}, already fails."
    return (
      f"{self.configurations[place]} is the cheapest ({self.costs[place]:.4g}) of {count}"
      f" certified among {len(self.configurations)} configurations that no other beats."
    )

  def statement(self, calibration, loss):
    """Each mean with its bound, and which configuration."""
    place = self.place([row.rejected for row in calibration.rows])
    means = super().statement(calibration, loss)
    return means if place is None else f"({self.configurations[place]}) {means}"
