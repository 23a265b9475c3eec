"""The p-value methods that `calibrate` knows, as objects."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from calm import signals
from calm.calibrate.evidence import betting, bounds, p_values
from calm.calibrate.losses import Support

# Pairs of a column and a tolerance that are tested at once; their losses should fit a cache.
_PAIRS = 256
# Losses that are copied at once: a table of any length is tested in memory of its own size.
_CELLS = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """Losses as a method sees them.

  Attributes:
    values: [num_examples, num_thresholds], in the tested order if `order` is None.
    support: declared range.
    tolerance: risk tolerance, a number or one a column.
    error_rate: error probability.
    order: [num_examples] rows in the tested order, for `Method.evidence`.
  """

  values: np.ndarray
  support: Support
  tolerance: npt.ArrayLike
  error_rate: float
  order: np.ndarray | None = None

  def pairs(self, columns: np.ndarray, part: slice = slice(None)) -> "Sample":
    """The sample whose column i is column `columns[i]` here, with tolerance i."""
    tolerance = np.asarray(self.tolerance)[part]
    values = self.values[:, columns[part]]
    return dataclasses.replace(self, values=values, tolerance=tolerance)

  def block(self, columns: np.ndarray) -> "Sample":
    """Some columns in the tested order; what leaves the range by rounding is put back."""
    values = self.values[:, columns]
    if self.order is not None:
      values = values[self.order]
    np.clip(values, self.support.lower, self.support.upper, out=values)
    return dataclasses.replace(self, values=values, order=None)


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to p-values.

  Attributes:
    name: registry name.
    log_p_values: Sample -> [num_thresholds] log p.
    upper_bounds: Sample -> [num_thresholds] upper confidence bounds at `error_rate`.
    refuses: Support -> (losses that it needs, way out) where it does not fit, or None.
    ordered: whether p-values depend on the order of prompts.
    clips: whether negative losses are set to 0 first (Eq. 11).
    any_level: whether p-values mean anything at levels other than `error_rate`; if not, only
      fixed sequence testing, which tests every hypothesis at that level, can use them.
    quick: a faster way to the answers of `certifies`, or None.
    p_value: (sum, number, tolerance) -> p, where that is all it depends on.
  """

  name: str
  log_p_values: Callable[[Sample], np.ndarray]
  upper_bounds: Callable[[Sample], np.ndarray]
  refuses: Callable[[Support], tuple[str, str] | None]
  ordered: bool = False
  clips: bool = False
  any_level: bool = True
  quick: Callable[[Sample, np.ndarray], np.ndarray] | None = None
  p_value: bounds.SumPValue | None = None

  def certifies(self, sample: Sample, columns: np.ndarray) -> np.ndarray:
    """Whether p <= error_rate, for many pairs of a column and a tolerance.

    Args:
      sample: losses, and a tolerance for each pair.
      columns: [num_pairs] column of each pair.

    Returns:
      [num_pairs] bool, that of `log_p_values` on each pair's column at its tolerance.
    """
    if self.quick is not None:
      return self.quick(sample, columns)
    parts = [slice(i, i + _PAIRS) for i in range(0, len(columns), _PAIRS)]
    found = [self.log_p_values(sample.pairs(columns, part)) for part in parts]
    return np.exp(np.concatenate([np.zeros(0), *found])) <= sample.error_rate

  def evidence(self, sample: Sample, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p-values and upper bounds that say the same, a few columns at a time.

    Args:
      sample: losses at one tolerance.
      usable: [num_thresholds] bool, columns whose losses can be tested.

    Returns:
      (log p, upper bounds), [num_thresholds] each; the bound is at most the tolerance exactly
      where p <= error_rate. Columns that are not usable have p = 1 and no bound (NaN).
    """
    log_p, bound = np.zeros(len(usable)), np.full(len(usable), np.nan)
    (columns,) = np.nonzero(usable)
    step = max(1, _CELLS // len(sample.values))
    for start in range(0, len(columns), step):
      signals.check()
      part = columns[start : start + step]
      block = sample.block(part)
      log_p[part] = self.log_p_values(block)
      bound[part] = self.upper_bounds(block)
    # Both are of one test, and p falls as the tolerance grows: they can only disagree by the
    # precision of a search.
    tolerance = float(np.asarray(sample.tolerance))
    above = np.maximum(bound, np.nextafter(tolerance, np.inf))
    rejected = np.exp(log_p) <= sample.error_rate
    return log_p, np.where(rejected, np.minimum(bound, tolerance), above)

  def resolve(self, support: Support, *, any_level: bool = False) -> "Method":
    """This method, if it fits losses of this support.

    Raises:
      ValueError: it does not.
    """
    del any_level
    # Clipping at 0 is the method; clipping at 1 would hide losses that it was not made for.
    clipped = Support(0.0, max(1.0, support.upper), support.binary)
    refused = self.refuses(clipped if self.clips else support)
    if refused:
      needed, way_out = refused
      declared = "binary " * support.binary + f"[{support.lower}, {support.upper}]"
      raise ValueError(
        f"Expected losses {needed} for `method` {self.name!r}, got the declared range"
        f" {declared}; {way_out}."
      )
    return self

  def prepare(self, values: np.ndarray, support: Support) -> tuple[np.ndarray, Support]:
    """(losses as this method tests them, their support)."""
    if not self.clips:
      return values, support
    return np.maximum(values, 0.0), Support(binary=support.binary)


@dataclasses.dataclass(frozen=True)
class Auto:
  """Chooses by the declared support, never by values: binary is exact, all others bet.

  Where every hypothesis is tested at one level (fixed sequence testing), bets are made for it.
  """

  binary: str = "binomial"
  one_level: str = "betting_fixed_level"
  any_level: str = "betting"

  def resolve(self, support: Support, *, any_level: bool = False) -> Method:
    """The method for losses of this support; see `get_method`."""
    bets = self.any_level if any_level else self.one_level
    return get_method(self.binary if support.binary else bets, support)


def _refuses_signed(support: Support) -> tuple[str, str] | None:
  if support.upper > 1.0:
    return "in [0, 1]", "divide losses and tolerance by the upper end, or use 'betting'"
  if support.lower < 0.0:
    return "in [0, 1]", "signed losses go into 'betting', and 'paper' clips them at 0"
  return None


def _refuses_all_but_binary(support: Support) -> tuple[str, str] | None:
  if not support.binary:
    return "that are declared binary (0 or 1)", "use 'convex_order' or 'betting'"
  return None


def _refuses_nothing(support: Support) -> None:
  del support


def _of_sums(name: str, p_value: bounds.SumPValue, **fields) -> Method:
  def log_p_values(sample: Sample) -> np.ndarray:
    return p_value(sample.values.sum(axis=0), len(sample.values), sample.tolerance, log=True)

  def upper_bounds(sample: Sample) -> np.ndarray:
    return bounds.invert(
      p_value, sample.values.sum(axis=0), len(sample.values), error_rate=sample.error_rate
    )

  def quick(sample: Sample, columns: np.ndarray) -> np.ndarray:
    sums = sample.values.sum(axis=0)[columns]
    return p_value(sums, len(sample.values), sample.tolerance) <= sample.error_rate

  fields = {"refuses": _refuses_signed, "quick": quick, "p_value": p_value, **fields}
  return Method(name, log_p_values, upper_bounds, **fields)


def _of_bets(name: str, strategy: betting.Strategy, **fields) -> Method:
  def log_p_values(sample: Sample) -> np.ndarray:
    return p_values.betting(
      sample.values,
      sample.tolerance,
      error_rate=sample.error_rate,
      upper=sample.support.upper,
      strategy=strategy,
      log=True,
    )

  def upper_bounds(sample: Sample) -> np.ndarray:
    return bounds.betting(
      sample.values,
      error_rate=sample.error_rate,
      lower=sample.support.lower,
      upper=sample.support.upper,
      tolerance=float(np.asarray(sample.tolerance)),
      strategy=strategy,
    )

  def quick(sample: Sample, columns: np.ndarray) -> np.ndarray:
    size, upper = len(sample.values), sample.support.upper
    design = strategy.design(sample.tolerance, sample.error_rate, size, upper)
    return betting.certifies(sample.values, columns, design, strategy)

  fields = {"ordered": True, "quick": quick, **fields}
  return Method(name, log_p_values, upper_bounds, _refuses_nothing, **fields)


METHODS: Mapping[str, Method | Auto] = {
  "auto": Auto(),
  "paper": _of_sums("paper", p_values.hoeffding_bentkus, clips=True),
  "hoeffding": _of_sums("hoeffding", p_values.hoeffding),
  "hoeffding_bentkus": _of_sums("hoeffding_bentkus", p_values.hoeffding_bentkus),
  "convex_order": _of_sums("convex_order", p_values.convex_order),
  "binomial": _of_sums("binomial", p_values.binomial, refuses=_refuses_all_but_binary),
  "betting": _of_bets("betting", betting.PLUG_IN),
  "betting_fixed_level": _of_bets("betting_fixed_level", betting.FIXED_LEVEL, any_level=False),
  "betting_early": _of_bets("betting_early", betting.EARLY, any_level=False),
}


def get_method(name: str, support: Support, *, any_level: bool = False) -> Method:
  """The method of a name, checked against the declared support.

  Args:
    name: a name of `METHODS`; 'auto' chooses by `support` and `any_level`.
    support: declared range of the losses.
    any_level: whether 'auto' needs p-values that mean something at every level (Holm, graphs),
      not at `error_rate` alone (fixed sequence testing).

  Raises:
    ValueError: the name is unknown, or the method does not fit such losses.
  """
  if name not in METHODS:
    raise ValueError(f"Expected `method` to be one of {sorted(METHODS)}, got {name!r}.")
  return METHODS[name].resolve(support, any_level=any_level)
