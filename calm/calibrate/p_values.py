"""p-values for H: E[loss] > tolerance from the sum of losses, and the bounds
that invert them.

Each satisfies P(p <= u) <= u for every u in [0, 1] whenever H is true: for
independent prompts, any distribution of losses in [0, 1], and every sample
size, in whatever order prompts are stored. Arguments are sums of losses (n * (k
/ n) is not always k), numbers of prompts and tolerances in (0, 1), broadcast;
`log=True` returns log p, which does not underflow.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

SumPValue = Callable[..., np.ndarray]

# share by which a sum that stands for an integer may be off by rounding
_SNAP = 1e-9
# a probability from `special.betaincc` that is near the end of float64
_TINY = 1e-280
# Bounds are sought with this precision, and between these tolerances.
_PRECISION = 1e-9
_LEAST = 1e-12
_MOST = 1.0 - 1e-12


def _p_value(log_p_value: Callable[..., np.ndarray]) -> SumPValue:
  """The p-value, or its logarithm, of arguments that are broadcast."""

  @functools.wraps(log_p_value)
  def p_value(sums, num_examples, tolerance, log: bool = False) -> np.ndarray:
    sums, sizes, tolerances = np.broadcast_arrays(
      np.asarray(sums, np.float64),
      np.asarray(num_examples),
      np.asarray(tolerance, np.float64),
    )
    sums = np.clip(sums, 0.0, sizes)
    log_p = np.minimum(
      log_p_value(sums, sizes.astype(np.int64), tolerances), 0.0
    )
    return log_p if log else np.exp(log_p)

  return p_value


def _ceil(sums: np.ndarray) -> np.ndarray:
  nearest = np.round(sums)
  snapped = np.abs(sums - nearest) <= _SNAP * np.maximum(1.0, nearest)
  return np.where(snapped, nearest, np.ceil(sums)).astype(np.int64)


@functools.lru_cache(maxsize=4)
def _log_choose(num_examples: int) -> np.ndarray:
  log_factorials = special.gammaln(np.arange(num_examples + 1) + 1.0)
  return log_factorials[-1] - log_factorials - log_factorials[::-1]


def log_binomial_cdf_table(num_examples: int, probability: float) -> np.ndarray:
  """[num_examples + 1] log P(Binomial(num_examples, probability) <= j), j = 0
  ..., in O(n).
  """
  successes = np.arange(num_examples + 1, dtype=np.float64)
  log_mass = (
    _log_choose(num_examples)
    + successes * np.log(probability)
    + successes[::-1] * np.log1p(-probability)
  )
  return np.minimum(np.logaddexp.accumulate(log_mass), 0.0)


def _groups(
  *arrays: np.ndarray,
) -> Iterator[tuple[tuple[float, ...], np.ndarray]]:
  """The different rows of broadcast arrays, each with the mask of where it
  stands.
  """
  for row in dict.fromkeys(
    zip(*(array.ravel().tolist() for array in arrays), strict=True)
  ):
    yield (
      row,
      np.logical_and.reduce(
        [array == v for array, v in zip(arrays, row, strict=True)]
      ),
    )


def _log_binomial_cdf(
  counts: np.ndarray, sizes: np.ndarray, probabilities: np.ndarray
):
  # P(Binomial(n, p) <= k) = 1 - I_p(k + 1, n - k). `special.bdtr` is 2.5e-9 off
  # at n = 1e6.
  successes = counts.astype(np.float64)
  failures = np.maximum(sizes - successes, 1.0)
  incomplete = special.betaincc(successes + 1.0, failures, probabilities)
  cdf = np.asarray(np.where(counts < sizes, incomplete, 1.0))
  tiny = ~(cdf > _TINY)
  log_cdf = np.array(np.log(np.where(tiny, 1.0, cdf)))
  for (size, probability, far), at in _groups(sizes, probabilities, tiny):
    if far:
      log_cdf[at] = log_binomial_cdf_table(int(size), probability)[counts[at]]
  return log_cdf


@_p_value
def hoeffding(sums, sizes, tolerances):
  """Hoeffding's p-value, Eq. 9 of the paper.

  p = exp(-2 n max(0, tolerance - mean)^2)
  """
  return -2.0 * sizes * np.maximum(0.0, tolerances - sums / sizes) ** 2


@_p_value
def hoeffding_bentkus(sums, sizes, tolerances):
  """The Hoeffding-Bentkus p-value, the paper's (section 4.2, footnote; Bates et
  al. 2021).

      p = min(exp(-n KL(min(mean, tolerance) || tolerance)),  e P(Binomial(n,
      tolerance) <= ceil(sum)))

  It is 1 whenever mean >= tolerance.
  """
  means = np.minimum(sums / sizes, tolerances)
  divergence = special.rel_entr(means, tolerances) + special.rel_entr(
    1 - means, 1 - tolerances
  )
  bentkus = 1.0 + _log_binomial_cdf(_ceil(sums), sizes, tolerances)
  return np.minimum(-sizes * divergence, bentkus)


@_p_value
def binomial(sums, sizes, tolerances):
  """The exact p-value for losses that are all 0 or 1.

  p = P(Binomial(n, tolerance) <= sum)
  """
  return _log_binomial_cdf(_ceil(sums), sizes, tolerances)


@_p_value
def convex_order(sums, sizes, tolerances):
  """Bentkus's bound before it is relaxed to the factor e; never above
  `hoeffding_bentkus`.

      p = min(1, min over whole h in (sum, n + 1] of  E[(h - B)_+] / (h - sum))
      B ~ Binomial(n, tolerance)

  Why it is valid. A loss in [0, 1] with mean m is below Bernoulli(m) in convex
  order, so the sum S of n independent losses of mean m > tolerance is below
  Binomial(n, m). For convex decreasing (h - x)_+ this gives E[(h - S)_+] <=
  E[(h - Binomial(n, m))_+] <= E[(h - B)_+] =: G(h). Let s be the largest value
  whose p is at most u: P(p <= u) = P(S <= s) <= G(h) / (h - s) for every h > s
  by Markov, and the least of them is at most u. G is linear between whole
  numbers, so the minimum stands at one. (Bentkus 2004, Annals of Probability
  32.)
  """
  log_p = np.empty(sums.shape)
  for (size, tolerance_), here in _groups(sizes, tolerances):
    # E[(h - B)_+] is the sum of P(B <= j) over j < h: entry j of the table is
    # of h = j + 1.
    log_hinges = np.logaddexp.accumulate(
      log_binomial_cdf_table(int(size), tolerance_)
    )
    levels = np.arange(1.0, size + 2.0)
    log_p[here] = [
      np.min(log_hinges[int(total) :] - np.log(levels[int(total) :] - total))
      for total in sums[here]
    ]
  return log_p


def invert(
  p_value: SumPValue,
  sums: npt.ArrayLike,
  num_examples: int,
  *,
  error_rate: float,
) -> np.ndarray:
  """[num_thresholds] largest tolerances that are not rejected, rounded up by at
  most 1e-9.
  """
  level = np.log(error_rate)

  @functools.cache
  def bound(total: float) -> float:
    def excess(at):
      return float(p_value(total, num_examples, at, log=True)) - level

    low = min(max(total / num_examples, _LEAST), _MOST)
    # Hoeffding's own bound is near, and hardly any p-value is worse; far tails
    # take longest.
    high = min(low + np.sqrt(-level / (2 * num_examples)), _MOST)
    if excess(high) > 0.0:
      high = _MOST
      if excess(high) > 0.0:
        return 1.0
    if excess(low) <= 0.0:
      return low
    root = float(optimize.brentq(excess, low, high, xtol=_PRECISION / 4))  # type: ignore
    # The root may lie a hair on the unrejected side; the bound may not.
    return min(1.0, root + _PRECISION)

  return np.vectorize(bound, otypes=[float])(np.asarray(sums, np.float64))
