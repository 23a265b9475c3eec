"""Risk functionals: what can be promised of a threshold; each is a transform of
the losses.

A promise turns a table of losses into `Part`s, each a table with a tolerance of
its own, and certifies a threshold where every part is certified (p = the
largest p over parts).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from calm import arguments
from calm.calibrate import checks
from calm.calibrate.generations.procedure import describe_differences
from calm.calibrate.losses import SequenceLosses, Support
from calm.calibrate.testing import Test


class Part(NamedTuple):
  """A test on losses [num_examples, num_thresholds], or on the `rows` that
  count at each.
  """

  test: Test
  losses: SequenceLosses
  rows: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Promise:
  """Base of all promises: a frozen dataclass of plain numbers.

  Fields with rows of prompts are not stored: a promise of a file cannot be
  tested again.
  """

  name: ClassVar[str]
  # What is not promised of prompts or clusters (`unit`).
  limits: ClassVar[str] = (
    "This is a mean over {unit} drawn like those: it says nothing of any "
    "single prompt, nor of"
    " prompts of another kind."
  )
  # Lengths of the grids that are tested each for itself; none where there is
  # one.
  grids = tuple[int, ...]()

  def tests(self, tolerance: float, support: Support) -> tuple[Test, ...]:
    """What will be tested of losses in `support`, in the order of `parts`."""
    return (Test("", tolerance, support),)

  def tested(
    self, losses: SequenceLosses, tolerance: float
  ) -> Iterable[tuple[Any, Any]]:
    """(other values, rows that count) of each test; None: those of the losses,
    all.
    """
    del losses, tolerance
    return [(None, None)]

  def parts(self, losses: SequenceLosses, tolerance: float) -> tuple[Part, ...]:
    """The tests on these losses; ValueError where the promise lacks fitting
    data.
    """
    tests = self.tests(tolerance, losses.support)
    parts = []
    for test, (values, rows) in zip(
      tests, self.tested(losses, tolerance), strict=True
    ):
      if values is not None:
        changed = dataclasses.replace(
          losses, values=values, support=test.support
        )
      parts.append(Part(test, losses if values is None else changed, rows))
    return tuple(parts)

  def place(self, rejected: Any) -> int | None:
    """Position of the served one of the certified rows [num_thresholds], or
    None.
    """
    (certified,) = np.nonzero(rejected)
    return int(certified[-1]) if len(certified) else None

  def statement(self, calibration: Any, loss: str) -> str:
    """The end of "decoding with threshold x has ..."; `loss` is the loss in
    words.
    """
    return f"an expected {loss} of at most {calibration.tolerance:.10g}"

  @classmethod
  def stored(cls) -> list[str]:
    """Names of the fields that files have."""
    return [field.name for field in dataclasses.fields(cls) if field.compare]

  def to_json(self) -> dict[str, Any]:
    """Name and numbers."""

    def plain(value):
      return list(value) if isinstance(value, tuple) else value

    values = {name: plain(getattr(self, name)) for name in self.stored()}
    if not values.get("grids", True):  # as in files of versions that had none
      del values["grids"]
    return {"name": self.name} | values


def rows_of(
  values: Any, losses: SequenceLosses, name: str, *, table: bool
) -> np.ndarray:
  """Data of a promise as an array with a row a prompt, and a column a threshold
  of a table.
  """
  shape = losses.values.shape if table else losses.values.shape[:1]
  got = "none: a promise read from a file cannot be tested again; make it anew"
  if values is not None:
    array = np.asarray(values)
    array = checks.as_numbers(array, name) if table else array
    if table and (odd := array[~((array >= 0.0) & (array < np.inf))].tolist()):
      raise ValueError(
        f"Expected `{name}` to be finite and at least 0, got {odd[0]!r}."
      )
    if array.shape == shape:
      return array
    got = f"shape {array.shape}; give a row of each prompt"
  raise ValueError(
    f"Expected `{name}` of shape {shape}, as `losses`, got {got}."
  )


@dataclasses.dataclass(frozen=True)
class Mean(Promise):
  """E[loss] <= tolerance, over all prompts (paper, Definitions 1 and 2)."""

  name: ClassVar[str] = "mean"


@dataclasses.dataclass(frozen=True)
class Quantile(Promise):
  """P(loss <= tolerance) >= share.

      Z = 1{loss > tolerance},   E[Z] <= 1 - share

  Z is binary, so the test is the exact binomial one.
  """

  share: float = 0.95  # of texts, in (0, 1)
  name: ClassVar[str] = "quantile"
  limits: ClassVar[str] = (
    "This is a share over {unit} drawn like those: it says nothing of how "
    "much the others lose,"
    " nor which they are, nor of prompts of another kind."
  )

  def __post_init__(self):
    vars(self).update(share=checks.in_range("share", self.share, 0.0, 1.0))

  def tests(self, tolerance, support):
    # 1 - 0.9 is 0.09999999999999998, which would ask for one prompt more.
    return (Test("", round(1.0 - self.share, 12), Support(binary=True)),)

  def tested(self, losses, tolerance):
    # What is NaN or outside of the range is NaN, and no threshold with it
    # passes.
    values = losses.values
    low = losses.support.lower
    high = losses.support.upper
    inside = (values >= low - 1e-9) & (values <= high + 1e-9)
    return [(np.where(inside, values > tolerance, np.nan), None)]

  def statement(self, calibration, loss):
    bound = calibration.tolerance
    share = 100.0 * self.share
    return (
      f"a {loss} of at most {bound:.10g} for at least {share:.10g} % of texts"
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class EveryGroup(Promise):
  """E[loss | group] <= tolerance in every group.

      p = max over groups of p on the prompts of that group

  There is no charge for the number of groups, but each needs prompts enough of
  its own.
  """

  groups: tuple[str, ...] = ()  # names, sorted; made of `labels`
  # [num_examples] group of each prompt.
  labels: Sequence[str] | None = dataclasses.field(
    default=None, repr=False, compare=False
  )
  name: ClassVar[str] = "every_group"
  limits: ClassVar[str] = (
    "These are means over the {unit} of each group, drawn like those: they "
    "say nothing of any"
    " single prompt, nor of a group that is not named."
  )

  def __post_init__(self):
    if self.labels is not None:
      vars(self).update(groups=tuple(sorted(set(map(str, self.labels)))))
    if not self.groups or "" in self.groups:
      raise ValueError(
        "Expected `labels` to name a group of every prompt, got none; give "
        "prompts without one"
        " a label of their own ('other'): without them the promise would be "
        "of other prompts."
      )
    checks.check_lines(self.groups, "labels")

  def tests(self, tolerance, support):
    return tuple(Test(group, tolerance, support) for group in self.groups)

  def tested(self, losses, tolerance):
    labels = rows_of(self.labels, losses, "labels", table=False)[:, None]
    shape = losses.values.shape
    return [
      (None, np.broadcast_to(labels == group, shape)) for group in self.groups
    ]

  def statement(self, calibration, loss):
    groups = ", ".join(repr(group) for group in self.groups[:12])
    rest = f" and {len(self.groups) - 12} more" if len(self.groups) > 12 else ""
    return (
      f"{super().statement(calibration, loss)} in each of the groups "
      f"{groups}{rest}"
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class EarlyExits(Promise):
  """E[loss | depth <= t] <= tolerance for every t of a fixed grid.

      p = max over t of p on the prompts whose depth at that threshold is at
      most t

  Given that their depth is at most t, prompts are independent draws from that
  event, so the test on them is valid (Ringel et al., arXiv 2402.00857).
  """

  # Grid of t, in the unit of `depths`, fixed before any depth was seen.
  limits_of_depth: tuple[float, ...] = ()
  # [num_examples, num_thresholds] depth of each text, such as layers a token;
  # at least 0.
  depths: Any = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "early_exits"
  limits: ClassVar[str] = (
    "These are means over the early texts of {unit} drawn like those: they "
    "say nothing of any"
    " single prompt, of other depths, nor of prompts of another kind."
  )

  def __post_init__(self):
    grid = (0.0, *self.limits_of_depth, math.inf)
    if len(grid) < 3 or not all(a < b for a, b in itertools.pairwise(grid)):
      raise ValueError(
        "Expected `limits_of_depth` to be finite, above 0 and to rise "
        "strictly, got"
        f" {self.limits_of_depth!r}."
      )
    vars(self).update(limits_of_depth=tuple(map(float, self.limits_of_depth)))

  def tests(self, tolerance, support):
    return tuple(
      Test(f"depth <= {t:g}", tolerance, support) for t in self.limits_of_depth
    )

  def tested(self, losses, tolerance):
    depths = rows_of(self.depths, losses, "depths", table=True)
    return [(None, depths <= limit) for limit in self.limits_of_depth]

  def statement(self, calibration, loss):
    limits = ", ".join(f"{limit:g}" for limit in self.limits_of_depth)
    among = f"among texts of mean depth at most t, for each t of {limits}"
    return f"{super().statement(calibration, loss)} {among}"


@dataclasses.dataclass(frozen=True)
class TailMean(Promise):
  """CVaR_beta(loss) <= tolerance: the mean over the worst share 1 - beta of
  texts.

      Z = start + max(0, loss - start) / (1 - beta),   E[Z] <= tolerance

  CVaR is at most E[Z] for every start (Rockafellar and Uryasev 2000), so any
  start that was fixed before these losses were seen is valid; the best is the
  beta-quantile of losses, to be taken from validation prompts. It must be below
  the tolerance.
  """

  beta: float = 0.9  # share of texts that are not counted, in (0, 1)
  start: float = 0.0  # where the tail begins, in the unit of the loss
  name: ClassVar[str] = "tail_mean"
  limits: ClassVar[str] = (
    "This is a mean over the worst texts among {unit} drawn like those: it "
    "says nothing of any"
    " single prompt, nor of prompts of another kind, and holds if the start "
    "of the tail"
    " ({start:.10g}) was fixed before these losses were seen."
  )

  def __post_init__(self):
    vars(self).update(beta=checks.in_range("beta", self.beta, 0.0, 1.0))
    vars(self).update(start=checks.in_range("start", self.start, -2.0, 1.0))

  def tests(self, tolerance, support):
    if not max(self.start, support.lower) < tolerance:
      raise ValueError(
        f"Expected `start` below the tolerance {tolerance}, got "
        f"{self.start}; no tail mean can"
        " be certified to lie below where the tail begins."
      )
    low, high = self._of(np.array([support.lower, support.upper])).tolist()
    return (Test("", tolerance, Support(low, high)),)

  def tested(self, losses, tolerance):
    return [(self._of(losses.values), None)]

  def _of(self, values: np.ndarray) -> np.ndarray:
    return self.start + np.maximum(0.0, values - self.start) / (1.0 - self.beta)

  def statement(self, calibration, loss):
    worst = 100.0 * (1.0 - self.beta)
    bound = calibration.tolerance
    return (
      f"a mean {loss} over the worst {worst:.10g} % of texts of at most "
      f"{bound:.10g}"
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class KnownMixture(Promise):
  """E_Q[loss] <= tolerance, for a mixture Q other than that of the calibration
  prompts P.

      Z = tolerance + w (loss - tolerance),   w = dQ / dP <= most,   E_P[Z] =
      E_Q[loss]

  since E_P[w] = 1. A bet of nu on Z is the factor 1 + nu w (tolerance - loss).
  Weights must be known, not estimated: shares of tasks at serving over shares
  in the calibration population. (Almeida et al., PMLR 266, 2025.)
  """

  most: float = 1.0  # declared upper bound of weights, at least 1
  # [num_examples] w of each prompt.
  weights: Any = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "known_mixture"
  limits: ClassVar[str] = (
    "This is a mean over {unit} weighted so: it says nothing of any single "
    "prompt nor of"
    " another mixture, and nothing at all if the weights were estimated."
  )

  def __post_init__(self):
    weights = (
      () if self.weights is None else checks.as_numbers(self.weights, "weights")
    )
    inside = np.greater_equal(weights, 0.0) & np.less_equal(weights, self.most)
    if not 1.0 <= self.most < math.inf or not np.all(inside):
      raise ValueError(
        "Expected `weights` in [0, `most`] and `most` of at least 1 (they "
        "have mean 1), got"
        f" `most` {self.most!r} and weights up to "
        f"{np.max(weights, initial=0.0)}."
      )
    if self.weights is not None:
      vars(self).update(weights=weights)

  def tests(self, tolerance, support):
    low = tolerance + self.most * (support.lower - tolerance)
    high = tolerance + self.most * (support.upper - tolerance)
    return (Test("", tolerance, Support(low, high)),)

  def tested(self, losses, tolerance):
    weights = rows_of(self.weights, losses, "weights", table=False)[:, None]
    return [(tolerance + weights * (losses.values - tolerance), None)]

  def statement(self, calibration, loss):
    weights = f"the caller's weights (at most {self.most:.10g})"
    return (
      f"{super().statement(calibration, loss)} over the mixture that "
      f"{weights} describe"
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True, eq=False)
class Risk:
  """One of several risks."""

  losses: SequenceLosses  # of the same prompts on the same grid as the others
  tolerance: float  # bound on their expectation
  name: str = ""  # in words; '' takes the losses' kind and metric


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class SeveralRisks(Promise):
  """E[loss of risk r] <= tolerance of r, for every r.

  p = max over risks
  """

  names: tuple[str, ...] = ()  # of the risks
  tolerances: tuple[float, ...] = ()  # of the risks
  # The tables.
  risks: Sequence[Risk] | None = dataclasses.field(
    default=None, repr=False, compare=False
  )
  name: ClassVar[str] = "several_risks"
  limits: ClassVar[str] = (
    "These are means over {unit} drawn like those: they say nothing of any "
    "single prompt, nor"
    " of prompts of another kind."
  )

  def __post_init__(self):
    if self.risks is not None:

      def named(risk):
        return risk.name or f"{risk.losses.kind} loss ({risk.losses.metric})"

      names = tuple(map(named, self.risks))
      vars(self).update(
        names=names, tolerances=tuple(float(r.tolerance) for r in self.risks)
      )
    if not self.names or len(self.names) != len(self.tolerances):
      raise ValueError(
        "Expected `risks` to hold at least one `Risk`, got none."
      )
    if len(set(self.names)) != len(self.names):
      raise ValueError(
        f"Expected `risks` of different names, got {list(self.names)}."
      )
    checks.check_lines(self.names, "names")

  def tests(self, tolerance, support):
    share = 1.0 / max(1, len(self.grids))
    pairs = zip(self.names, self.tolerances, strict=True)
    return tuple(Test(name, bound, support, share) for name, bound in pairs)

  def parts(self, losses, tolerance):
    if self.risks is None:
      raise ValueError(
        "Expected `risks` with their tables, got a promise read from a file."
      )
    parts = []
    for test, risk in zip(
      self.tests(tolerance, losses.support), self.risks, strict=True
    ):
      other = risk.losses
      difference = ""
      if len(other.values) != len(losses.values) or other.ids != losses.ids:
        raise ValueError(
          f"Expected `risks` of the same prompts, got others in {test.name!r}."
        )
      if not np.array_equal(losses.thresholds, other.thresholds):
        grids = other.thresholds.tolist(), losses.thresholds.tolist()
        difference = "the grid {} beside {}".format(*grids)
      elif None not in (losses.procedure, other.procedure):
        difference = describe_differences(losses.procedure, other.procedure)
      if difference:
        raise ValueError(
          "Expected `risks` of outputs of one grid and procedure, got "
          "another of"
          f" {test.name!r}: {difference}; take every loss from the same "
          "outputs."
        )
      parts.append(Part(test, other))
    return tuple(parts)

  def statement(self, calibration, loss):
    pairs = zip(self.names, self.tolerances, strict=True)
    bounds = [f"{name} of at most {bound:.10g}" for name, bound in pairs]
    return f"expected values of {' and '.join(bounds)}"


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Cost(Promise):
  """E[loss] <= tolerance and E[cost / full cost] <= at_most.

      Z = cost of the early text / cost of the same at full depth, in [0, 1]

  Losses rise and costs fall along the grid, so the two are tested from opposite
  ends: the risk from the highest threshold down at (1 - share) of the error
  rate, the cost from the lowest up at `share` of it. A threshold that both
  certify keeps both (union bound).
  """

  at_most: float = 0.5  # bound on the mean ratio, in (0, 1)
  share: float = 0.5  # of the error rate that the cost may use
  unit: str = "decoder layers a token"  # what is counted, in words
  # [num_examples, num_thresholds] ratio of each text, in [0, 1].
  costs: Any = dataclasses.field(default=None, repr=False, compare=False)
  name: ClassVar[str] = "cost"
  limits: ClassVar[str] = (
    SeveralRisks.limits[:-1]
    + ", and nothing of seconds, which the machine decides."
  )

  def __post_init__(self):
    checks.in_range("at_most", self.at_most, 0.0, 1.0)
    checks.in_range("share", self.share, 0.0, 1.0)

  def tests(self, tolerance, support):
    risk = Test("risk", tolerance, support, 1.0 - self.share)
    return risk, Test(
      "cost", self.at_most, Support(), self.share, ascending=True
    )

  def tested(self, losses, tolerance):
    return [
      (None, None),
      (rows_of(self.costs, losses, "costs", table=True), None),
    ]

  def statement(self, calibration, loss):
    return (
      f"{super().statement(calibration, loss)}, and needs at most "
      f"{self.at_most:.10g} of the"
      f" {self.unit} of full depth (at least x{1.0 / self.at_most:.4g} "
      "fewer), on average over"
      " texts"
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Configurations(SeveralRisks):
  """E[loss of risk r] <= tolerance of r, for every r, of one configuration
  among many.

  Rows are configurations, grid after grid; the cheapest certified one is
  served. Made by `certify.calibrate_configurations`.
  """

  configurations: tuple[str, ...] = ()  # names, in the tested order
  costs: tuple[float, ...] = ()  # of the configurations
  # Configurations of each family, which is tested for itself at its share of
  # the error rate; empty in files of versions that tested one order of all.
  grids: tuple[int, ...] = ()
  name: ClassVar[str] = "configurations"

  def __post_init__(self):
    super().__post_init__()
    count = len(self.configurations)
    whole = (
      sum(self.grids) == count and min(self.grids) > 0
      if self.grids
      else count > 0
    )
    if (
      not whole or len(self.costs) != count or not np.isfinite(self.costs).all()
    ):
      raise ValueError(
        "Expected `configurations` with a finite cost each, in `grids` that "
        "have them all, got"
        f" {count}, {len(self.costs)} costs and grids of {self.grids!r:.200}."
      )
    checks.check_lines(self.configurations, "configurations")

  def place(self, rejected: Any) -> int | None:
    """The cheapest certified configuration; of equal ones the first."""
    (certified,) = np.nonzero(rejected)
    return min(certified.tolist(), key=self.costs.__getitem__, default=None)

  def reason(self, rejected: np.ndarray) -> str:
    """Why a configuration is served."""
    if (place := self.place(rejected)) is None:
      return (
        "Nothing is certified: the safest configuration of every family "
        "already fails."
      )
    return (
      f"{self.configurations[place]} is the cheapest "
      f"({self.costs[place]:.4g}) of"
      f" {np.sum(rejected)} certified among {len(self.configurations)} "
      "configurations."
    )

  def statement(self, calibration, loss):
    place = self.place([row.rejected for row in calibration.rows])
    means = super().statement(calibration, loss)
    return means if place is None else f"({self.configurations[place]}) {means}"


PROMISES: Mapping[str, type[Promise]] = {
  promise.name: promise
  for promise in (
    *(Mean, Quantile, EveryGroup, EarlyExits, TailMean),
    *(KnownMixture, SeveralRisks, Cost, Configurations),
  )
}


def from_json(value: Any) -> Promise:
  """The inverse of `Promise.to_json`; ValueError where a name, field or range
  is wrong.
  """
  name = value.get("name") if isinstance(value, Mapping) else None
  if not isinstance(name, str) or name not in PROMISES:
    raise ValueError(
      f"Expected `promise` to name one of {sorted(PROMISES)}, got {value!r}."
    )
  found = {
    k: tuple(v) if isinstance(v, list) else v
    for k, v in value.items()
    if k != "name"
  }
  allowed = set(PROMISES[name].stored()) - ({"grids"} - set(value))
  if set(found) != allowed:
    raise ValueError(
      f"Expected `promise` {name!r} with the fields {sorted(allowed)}, got "
      f"{sorted(found)}; it"
      " was made by another version, or edited."
    )
  return PROMISES[name](**found)
