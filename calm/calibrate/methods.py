"""The p-value methods that `calibrate` knows, by name."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from calm import arguments
from calm.calibrate import betting, p_values
from calm.calibrate.losses import Support

_CELLS = 2**20  # losses that are copied at once


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to p-values: a p-value of the sum of losses, or bets on them in their
  order.
  """

  name: str
  # of the sum of losses; None: of bets
  p_value: p_values.SumPValue | None = None
  # Whether bets are made for the one level of fixed sequence testing, and
  # useless at any other.
  hedges: bool = False
  # whether a uniform beside the losses decides at the end
  randomized: bool = False
  clips: bool = False  # whether negative losses are set to 0 first (Eq. 11)

  @property
  def ordered(self) -> bool:
    """Whether p-values depend on the order of prompts."""
    return self.p_value is None

  def design(
    self,
    tolerance,
    error_rate,
    size: int,
    upper=1.0,
    uniform: npt.ArrayLike = 1.0,
  ) -> betting.Design:
    """The test of `size` losses up to `upper`."""
    uniform = uniform if self.randomized else 1.0
    return betting.Design(
      tolerance, error_rate, size, upper, self.hedges, uniform
    )

  def log_p_values(
    self, values: np.ndarray, design: betting.Design
  ) -> np.ndarray:
    """[num_thresholds] log p of losses in the tested order."""
    if self.p_value is not None:
      return self.p_value(
        values.sum(axis=0), len(values), design.tolerance, log=True
      )
    return betting.log_p_value(values, design)

  def evidence(
    self,
    values: np.ndarray,
    support: Support,
    design: betting.Design,
    usable: np.ndarray,
    order: np.ndarray | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """(log p, upper bounds) [num_thresholds], a few columns at a time, rows in
    `order`.

    The bound is at most the tolerance exactly where p <= error_rate. Columns
    that are not `usable` have p = 1 and no bound (NaN).
    """
    log_p = np.zeros(len(usable))
    bound = np.full(len(usable), np.nan)
    (columns,) = np.nonzero(usable)
    step = max(1, _CELLS // len(values))
    for start in range(0, len(columns), step):
      part = columns[start : start + step]
      losses = values[:, part] if order is None else values[:, part][order]
      # What leaves the range by rounding is put back.
      np.clip(losses, support.lower, support.upper, out=losses)
      if self.p_value is not None:
        log_p[part] = self.log_p_values(losses, design)
        sums = losses.sum(axis=0)
        level = design.error_rate
        bound[part] = p_values.invert(
          self.p_value, sums, len(losses), error_rate=level
        )
      else:
        bets = design.bets(losses)
        log_p[part] = betting.log_p_value(losses, design, bets)
        bound[part] = betting.upper_bound(losses, design, support.lower, bets)
    # Both are of one test: they can only disagree by the precision of a search.
    above = np.maximum(bound, np.nextafter(design.tolerance, np.inf))
    rejected = np.exp(log_p) <= design.error_rate
    return log_p, np.where(rejected, np.minimum(bound, design.tolerance), above)

  def prepare(
    self, values: np.ndarray, support: Support
  ) -> tuple[np.ndarray, Support]:
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
    Method("betting_fixed_level", hedges=True),
    Method("betting_randomized", hedges=True, randomized=True),
  )
}
NAMES = ("auto", *METHODS)
# p-values by which stored calibrations are checked; the last three were methods
# once.
SUM_P_VALUES: Mapping[str, p_values.SumPValue | None] = {
  **{name: method.p_value for name, method in METHODS.items()},
  "hoeffding": p_values.hoeffding,
  "hoeffding_bentkus": p_values.hoeffding_bentkus,
  "betting_early": None,
}


def get_method(
  name: str,
  support: Support,
  *,
  any_level: bool = False,
  randomized: bool = True,
) -> Method:
  """The method of a name; ValueError where it is unknown or does not fit the
  declared support.

  'auto' chooses by `support`, never by values, and by whether p-values must
  mean something at every level (Holm, fallback), not at `error_rate` alone
  (fixed sequence testing); there it may be `randomized`.
  """
  if arguments.one_of("method", name, NAMES) == "auto":
    bets = "betting_randomized" if randomized else "betting_fixed_level"
    name = "binomial" if support.binary else "betting" if any_level else bets
  method = METHODS[name]
  way_out = ""
  if any_level and method.hedges:
    way_out = (
      "it bets for the one level of 'fixed_sequence': use 'betting' with others"
    )
  elif name == "binomial" and not support.binary:
    way_out = (
      "declare losses binary (0 or 1), or use 'convex_order' or 'betting'"
    )
  elif not method.ordered and support.upper > 1.0:
    way_out = "divide losses and tolerance by the upper end, or use 'betting'"
  elif not method.ordered and support.lower < 0.0 and not method.clips:
    way_out = "signed losses go into 'betting', and 'paper' clips them at 0"
  if way_out:
    raise ValueError(
      "Expected a `method` for the testing procedure and the declared range"
      f" [{support.lower}, {support.upper}], got {name!r}; {way_out}."
    )
  return method
