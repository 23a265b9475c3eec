"""Calibration that decodes no more prompts than it needs.

Prompts come in a recorded order. At each threshold, from the safest down, wealth is followed
prompt by prompt: it certifies as soon as it reaches 1 / error_rate, and it fails as soon as
even the lowest declared loss at the largest bet on all remaining prompts would not get it
there. The first failure ends the grid (fixed sequence testing). Stopping early is valid because
each bet is a function of the losses before it in that order, of tolerance, error rate and the
planned number alone. Of clusters, each is one loss, its mean.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from calm import arguments
from calm.calibrate import betting, checks, metrics
from calm.calibrate import losses as sequence_losses
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.calibration import Calibration, Row
from calm.calibrate.generations import order
from calm.calibrate.generations.cache import Generations
from calm.calibrate.generations.procedure import Procedure, Provenance
from calm.calibrate.losses import Support

# Losses leave their range by rounding at most so far.
_SLACK = 1e-9
# Bets that aim at the one level of fixed sequence testing, and go on when they are ahead.
METHOD, _BETS = "betting_early", betting.EARLY
OPEN, CERTIFIED, FAILED = "open", "certified", "failed"


@dataclasses.dataclass(frozen=True)
class Request:
  """Losses that are wanted next.

  Attributes:
    threshold: at which threshold.
    start: first prompt, as a position in the recorded order.
    stop: one past the last prompt.
  """

  threshold: float
  start: int
  stop: int


class _Column:
  """One threshold: its losses, and the wealth of bets on them.

  Bets go loss by loss, so that batches change no digit of what `betting.log_wealth` gives.
  """

  def __init__(self, design: betting.Design, lower: float):
    self.state, self.highest = OPEN, 0.0
    self.losses: list[float] = []
    self._design, self._lower = design, lower
    self._hedge = betting.Hedge(design, 1)
    self._total = self._squares = 0.0

  def add(self, losses: Sequence[float]) -> None:
    """Takes losses up to the one that decides."""
    design = self._design
    best_gain = float(np.log1p(design.cap * (np.asarray(design.tolerance) - self._lower)))
    for loss in losses:
      if self.state != OPEN:
        return
      self._hedge.advance(np.array([[loss]]), np.array([[self._squares]]))
      self._total += loss
      self._squares += (loss - self._total / (self._hedge.row + 1.0)) ** 2
      self.losses.append(loss)
      wealth = float(self._hedge.wealth[0])
      self.highest = max(self.highest, wealth)
      left = design.planned_size - len(self.losses)
      if wealth >= design.target:
        self.state = CERTIFIED
      elif left == 0 or wealth + left * best_gain < design.target:
        self.state = FAILED

  @property
  def log_p_value(self) -> float:
    """log p; of what is certified at most the level, which rounding might miss."""
    level = -self._design.target if self.state == CERTIFIED else 0.0
    return min(level, -self.highest)


@arguments.checked()
class SequentialCalibration:
  """Asks for losses and decides; see the module's description.

  test = SequentialCalibration(grid, num_examples, tolerance=0.1, error_rate=0.05)
  while (request := test.request(batch_size)) is not None:
    test.add(losses_of(request))
  calibration = test.calibration()
  """

  def __init__(
    self,
    thresholds: Sequence[float] | np.ndarray,
    planned_size: int,
    *,
    tolerance: float,
    error_rate: float,
    support: Support | None = None,
    clusters: bool = False,
  ):
    """Starts with no losses.

    Args:
      thresholds: strictly descending grid.
      planned_size: prompts (or clusters) that may be decoded at most.
      tolerance: delta, in (0, 1).
      error_rate: epsilon, in (0, 1).
      support: declared range of losses; [0, 1] by default.
      clusters: whether losses are means of clusters of prompts.

    Raises:
      ValueError: an argument leaves its range.
    """
    self.thresholds = thresholds_lib.validate_grid(thresholds)
    self.clusters = clusters
    self.support = support or Support()
    if clusters:  # means of several 0-or-1 losses are not 0 or 1
      self.support = Support(self.support.lower, self.support.upper)
    betting.check_levels(tolerance, error_rate, self.support.upper)
    checks.warn_of_error_rate(error_rate)
    if tolerance <= 0.0 or planned_size < 1:
      raise ValueError(
        "Expected `tolerance` to be in (0, 1) and `planned_size` at least 1, got"
        f" {tolerance!r} and {planned_size!r}."
      )
    self.design = _BETS.design(tolerance, error_rate, planned_size, self.support.upper)
    self._columns = [_Column(self.design, self.support.lower)]

  @property
  def finished(self) -> bool:
    """Whether nothing more is wanted."""
    return self._columns[-1].state != OPEN

  @arguments.checked()
  def request(self, batch_size: int = 1) -> Request | None:
    """The next prompts to decode, at most `batch_size` of them; None when all is decided.

    Raises:
      ValueError: `batch_size` is not a whole number of at least 1.
    """
    if batch_size < 1:
      raise ValueError(f"Expected `batch_size` to be at least 1, got {batch_size!r}.")
    if self.finished:
      return None
    seen = len(self._columns[-1].losses)
    stop = min(seen + batch_size, self.design.planned_size)
    return Request(float(self.thresholds[len(self._columns) - 1]), seen, stop)

  def add(self, losses: Sequence[float] | np.ndarray) -> str:
    """Takes the losses that `request` asked for, in the recorded order.

    Losses after the one that decides are kept on record and not used.

    Returns:
      The state of their threshold: 'open', 'certified' or 'failed'.

    Raises:
      ValueError: nothing was asked for, there are more than planned, or a loss is NaN or out of
        its declared range.
    """
    values = checks.as_numbers(losses, "losses")
    if values.ndim != 1:
      raise ValueError(f"Expected `losses` to be a list of numbers, got shape {values.shape}.")
    column = self._columns[-1]
    if self.finished or len(column.losses) + len(values) > self.design.planned_size:
      raise ValueError(
        "Expected `losses` to be those of the last `request`, got more than it asked for."
      )
    low, high = self.support.lower, self.support.upper
    inside = (values >= low - _SLACK) & (values <= high + _SLACK)
    if not inside.all():
      place = int(np.argmin(inside))
      raise ValueError(
        f"Expected `losses` to lie in the declared range [{low}, {high}], got"
        f" {float(values[place])!r} at prompt {len(column.losses) + place} of the order."
      )
    column.add(np.clip(values, low, high).tolist())
    if column.state == CERTIFIED and len(self._columns) < len(self.thresholds):
      self._columns.append(_Column(self.design, low))
    return column.state

  def calibration(
    self,
    *,
    kind: str = "loss",
    metric: str = sequence_losses.UNKNOWN,
    order: str = "permuted",
    seed: str = "",
    procedure: Procedure | None = None,
    provenance: Provenance | None = None,
    groups_ignored: bool = False,
  ) -> Calibration:
    """The outcome; p-values and bounds hold whenever one stops, means are left out.

    Args:
      kind: what the loss is.
      metric: name of the text metric.
      order: 'permuted' by `seed`, or 'given'.
      seed: hexadecimal seed of the order.
      procedure: how outputs were decoded, or None.
      provenance: the story of the numbers.
      groups_ignored: whether prompts come in clusters and were taken for independent.

    Returns:
      A `Calibration` with `sequential` set.

    Raises:
      ValueError: losses are still wanted.
    """
    if not self.finished:
      raise ValueError(
        "Expected `calibration` of a finished test, got one that still asks for losses;"
        " answer `request` first."
      )
    rows = [self._row(index) for index in range(len(self.thresholds))]
    certified = [row.threshold for row in rows if row.rejected]
    return Calibration(
      threshold=min(certified) if certified else thresholds_lib.NEVER_EXIT,
      reason=self._reason(len(certified)),
      tolerance=float(np.asarray(self.design.tolerance)),
      error_rate=self.design.error_rate,
      method=METHOD,
      testing="fixed_sequence",
      kind=kind,
      metric=metric,
      support=self.support,
      num_examples=self.design.planned_size,
      clusters=self.clusters,
      groups_ignored=groups_ignored,
      rows=tuple(rows),
      visited=tuple(range(len(self._columns))),
      order=order,
      seed=seed,
      sequential=True,
      procedure=procedure,
      provenance=provenance or Provenance(metric=metric, order=order, method=METHOD),
    )

  def _row(self, index: int) -> Row:
    threshold = float(self.thresholds[index])
    if index >= len(self._columns) or not self._columns[index].losses:
      return Row(threshold, 0, math.nan, 1.0, 0.0, math.nan, 1.0, False)
    column = self._columns[index]
    tolerance = float(np.asarray(self.design.tolerance))
    bound = float(
      betting.upper_bound(
        column.losses,
        error_rate=self.design.error_rate,
        lower=self.support.lower,
        upper=self.support.upper,
        planned_size=self.design.planned_size,
        tolerance=tolerance,
        strategy=_BETS,
      )
    )
    certified = column.state == CERTIFIED
    # Bound and decision are of one test; they differ by the precision of a search at most.
    above = max(bound, float(np.nextafter(tolerance, np.inf)))
    p_values = [math.exp(each.log_p_value) for each in self._columns[: index + 1]]
    return Row(
      threshold=threshold,
      num_examples=len(column.losses),
      # A mean that stopped when it looked good is no estimate.
      mean=math.nan,
      p_value=p_values[-1],
      log_p_value=column.log_p_value,
      upper_bound=min(bound, tolerance) if certified else above,
      adjusted_p_value=max(p_values),
      rejected=certified,
    )

  def _reason(self, certified: int) -> str:
    used = sum(len(column.losses) for column in self._columns)
    most = self.design.planned_size * len(self.thresholds)
    cost = f" {used} of at most {most} losses were needed."
    if certified == len(self.thresholds):
      return f"Every threshold of the grid is certified.{cost}"
    failed = self.thresholds[certified]
    seen = len(self._columns[certified].losses)
    why = f"{failed} could no longer be certified after {seen} prompts.{cost}"
    if certified:
      return f"{self.thresholds[certified - 1]} is the lowest certified threshold; {why}"
    return f"Nothing is certified: the first threshold {why}"


def replay(
  cached: Generations,
  *,
  tolerance: float,
  error_rate: float,
  kind: str,
  metric: metrics.MetricLike,
) -> Calibration:
  """Tests a sequential run prompt by prompt, or cluster by cluster, as it was decoded.

  Args:
    cached: a sequential run; prompts are in the order of the test.
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: the text metric, as for `metrics.get_metric`.

  Returns:
    The calibration that the run itself wrote, if at the same rates.

  Raises:
    ValueError: at these rates the test would have asked for more prompts than the run has.
  """
  metric = metrics.get_metric(metric)
  columns = sequence_losses.prefix_losses(cached, kind, metric=metric)
  groups = order.prompt_clusters(cached.prompts) if cached.by_group else None
  units = order.consecutive_units(len(cached.prompts), groups)
  test = SequentialCalibration(
    cached.thresholds,
    len(units),
    tolerance=tolerance,
    error_rate=error_rate,
    support=sequence_losses.kind_support(kind, metric),
    clusters=cached.by_group,
  )
  thresholds = cached.thresholds.tolist()
  while (request := test.request(1)) is not None:
    column = columns[thresholds.index(request.threshold)]
    unit = units[request.start]
    if unit.stop > len(column):
      raise ValueError(
        f"Expected a sequential run for `tolerance` {tolerance} and `error_rate` {error_rate},"
        f" got one that stopped earlier, at threshold {request.threshold} after {len(column)}"
        " prompts; generate again with these rates, or calibrate with the run's own."
      )
    test.add([column[unit].mean()])
  return test.calibration(
    kind=kind,
    metric=metric.name,
    seed=order.order_seed(
      order.unit_names(cached.ids, groups),
      cached.procedure,
      order.prompts_digest(cached.prompts),
    ),
    procedure=cached.procedure,
    groups_ignored=not cached.by_group and order.known_groups(cached.prompts) is not None,
  )
