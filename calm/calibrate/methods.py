"""The p-value methods that `calibrate` knows, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from calm import signals
from calm.calibrate import betting, p_values
from calm.calibrate.losses import Support

# Losses that are copied at once: a table of any length is tested in memory of its own size.
_CELLS = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """Losses as a method sees them."""

  values: np.ndarray  # [num_examples, num_thresholds], in the tested order if `order` is None
  support: Support  # declared range
  tolerance: npt.ArrayLike  # risk tolerance; a number, or one a pair for `Method.certifies`
  error_rate: float  # error probability
  # [num_examples] rows in the tested order, for `Method.evidence`.
  order: np.ndarray | None = None
  # Drawn beside the losses for randomised tests: a number, or one a column (or pair).
  uniform: npt.ArrayLike = 1.0


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to p-values: a p-value of the sum of losses, or a strategy of bets."""

  name: str  # registry name
  # (sum, number, tolerance) -> p, where that is all it depends on.
  p_value: p_values.SumPValue | None = None
  # Rule for bets, whose p-values depend on the order of prompts.
  strategy: betting.Strategy = betting.PLUG_IN
  clips: bool = False  # whether negative losses are set to 0 first (Eq. 11)
  # Whether p-values mean anything at levels other than `error_rate`; if not, only fixed
  # sequence testing, which tests every hypothesis at that level, can use them.
  any_level: bool = True
  randomized: bool = False  # whether a uniform beside the losses decides at the end

  @property
  def ordered(self) -> bool:
    """Whether p-values depend on the order of prompts."""
    return self.p_value is None

  def log_p_values(self, sample: Sample) -> np.ndarray:
    """[num_thresholds] log p."""
    values = sample.values
    if self.p_value is not None:
      return self.p_value(values.sum(axis=0), len(values), sample.tolerance, log=True)
    return betting.p_value(values, sample.tolerance, **self._bet(sample), log=True)

  def _bet(self, sample: Sample) -> dict[str, Any]:
    """Options of the bets."""
    uniform = sample.uniform if self.randomized else 1.0
    level = {"error_rate": sample.error_rate, "upper": sample.support.upper}
    return level | {"strategy": self.strategy, "uniform": uniform}

  def upper_bounds(self, sample: Sample) -> np.ndarray:
    """[num_thresholds] upper confidence bounds at `error_rate`."""
    values, level = sample.values, sample.error_rate
    if self.p_value is not None:
      return p_values.invert(self.p_value, values.sum(axis=0), len(values), error_rate=level)
    tested = {"lower": sample.support.lower, "tolerance": float(np.asarray(sample.tolerance))}
    return betting.upper_bound(values, **tested, **self._bet(sample))

  def certifies(self, sample: Sample, columns: np.ndarray) -> np.ndarray:
    """[num_pairs] whether p <= error_rate, for pairs of a column and a tolerance."""
    values, level = sample.values, sample.error_rate
    if self.p_value is not None:
      sums = values.sum(axis=0)[columns]
      return self.p_value(sums, len(values), sample.tolerance) <= level
    upper = sample.support.upper
    design = self.strategy.design(sample.tolerance, level, len(values), upper)
    if self.randomized:
      design = dataclasses.replace(design, log_uniform=np.log(sample.uniform))
    return betting.certifies(values, columns, design, self.strategy)

  def evidence(self, sample: Sample, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log p, upper bounds) [num_thresholds], a few columns at a time.

    The bound is at most the tolerance exactly where p <= error_rate. Columns that are not
    `usable` have p = 1 and no bound (NaN).
    """
    log_p, bound = np.zeros(len(usable)), np.full(len(usable), np.nan)
    (columns,) = np.nonzero(usable)
    step = max(1, _CELLS // len(sample.values))
    uniform = np.broadcast_to(sample.uniform, len(usable))
    for start in range(0, len(columns), step):
      signals.check()
      part = columns[start : start + step]
      values = sample.values[:, part]
      if sample.order is not None:
        values = values[sample.order]
      # What leaves the range by rounding is put back.
      np.clip(values, sample.support.lower, sample.support.upper, out=values)
      block = dataclasses.replace(sample, values=values, order=None, uniform=uniform[part])
      method = self if self.p_value is not None else self._with_bets(block)
      log_p[part] = method.log_p_values(block)
      bound[part] = method.upper_bounds(block)
    # Both are of one test, and p falls as the tolerance grows: they can only disagree by the
    # precision of a search.
    tolerance = float(np.asarray(sample.tolerance))
    above = np.maximum(bound, np.nextafter(tolerance, np.inf))
    rejected = np.exp(log_p) <= sample.error_rate
    return log_p, np.where(rejected, np.minimum(bound, tolerance), above)

  def _with_bets(self, sample: Sample) -> "Method":
    """This method with its bets on a sample, which p-values and bounds share."""
    count, upper = len(sample.values), sample.support.upper
    design = self.strategy.design(sample.tolerance, sample.error_rate, count, upper)
    bets = self.strategy.free(sample.values, design)
    strategy = dataclasses.replace(self.strategy, free=lambda losses, design: bets)
    return dataclasses.replace(self, strategy=strategy)

  def prepare(self, values: np.ndarray, support: Support) -> tuple[np.ndarray, Support]:
    """(losses as this method tests them, their support)."""
    if not self.clips:
      return values, support
    return np.maximum(values, 0.0), Support(binary=support.binary)


METHODS: Mapping[str, Method] = {
  method.name: method
  for method in (
    Method("paper", p_values.hoeffding_bentkus, clips=True),
    Method("convex_order", p_values.convex_order),
    Method("binomial", p_values.binomial),
    Method("betting"),
    Method("betting_fixed_level", strategy=betting.FIXED_LEVEL, any_level=False),
    Method(
      "betting_randomized", strategy=betting.FIXED_LEVEL, any_level=False, randomized=True
    ),
  )
}
NAMES = ("auto", *METHODS)
# p-values by which stored calibrations are checked; the last three were methods once.
SUM_P_VALUES: Mapping[str, p_values.SumPValue | None] = {
  **{name: method.p_value for name, method in METHODS.items()},
  "hoeffding": p_values.hoeffding,
  "hoeffding_bentkus": p_values.hoeffding_bentkus,
  "betting_early": None,
}


def get_method(
  name: str, support: Support, *, any_level: bool = False, randomized: bool = True
) -> Method:
  """The method of a name; ValueError where it is unknown or does not fit the declared support.

  'auto' chooses by `support`, never by values, and by whether p-values must mean something at
  every level (Holm, fallback), not at `error_rate` alone (fixed sequence testing); there it
  may be `randomized`.
  """
  if name not in NAMES:
    earlier = ""
    if name in SUM_P_VALUES:
      earlier = ", of which earlier calibrations are read but no new ones are made"
    raise ValueError(f"Expected `method` to be one of {sorted(NAMES)}, got {name!r}{earlier}.")
  if name == "auto":
    bets = "betting_randomized" if randomized else "betting_fixed_level"
    bets = "betting" if any_level else bets
    name = "binomial" if support.binary else bets
  method = METHODS[name]
  needed, way_out = "in [0, 1]", ""
  if name == "binomial" and not support.binary:
    needed = "that are declared binary (0 or 1)"
    way_out = "use 'convex_order' or 'betting'"
  elif method.p_value is not None and support.upper > 1.0:
    way_out = "divide losses and tolerance by the upper end, or use 'betting'"
  elif method.p_value is not None and support.lower < 0.0 and not method.clips:
    way_out = "signed losses go into 'betting', and 'paper' clips them at 0"
  if way_out:
    declared = "binary " * support.binary + f"[{support.lower}, {support.upper}]"
    raise ValueError(
      f"Expected losses {needed} for `method` {name!r}, got the declared range {declared};"
      f" {way_out}."
    )
  return method
