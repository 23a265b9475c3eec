"""Mutants of `calm.calibrate` that no test can see, each with why.

`mutation_check.py` counts them apart.
A key is a module and the text of the line with what was done to it; a line that is edited loses
its entry, which tests/scripts/mutation_check_test.py tells.
"""

EQUIVALENT: dict[tuple[str, str], str] = {
  (
    "evidence/p_values",
    "tiny = ~(cdf > _TINY) [Gt -> GtE]",
  ): "the table gives the same number there",
  (
    "evidence/p_values",
    "log_cdf = np.array(np.log(np.where(tiny, 1.0, cdf))) [1.0 -> 2.0]",
  ): "the table replaces these entries",
  (
    "evidence/p_values",
    "if np.any(sizes < 1) or np.any(sizes != np.floor(sizes)): [floor -> ceil]",
  ): "whole numbers are those that either leaves alone",
  (
    "evidence/p_values",
    "snapped = np.abs(sums - nearest) <= _SNAP * np.maximum(1.0, nearest) [1.0 -> 2.0]",
  ): "other sums next to 0 and 1 only, where Bentkus's term is above Hoeffding's: at 1 that is"
  " n d (1 - d)^(n - 1) / (1 - 1 / n)^(n - 1), at most e times P(B = 1)",
  (
    "evidence/p_values",
    "for row in dict.fromkeys(zip(*(array.ravel().tolist() for array in arrays), strict=True)):"
    " [True -> False]",
  ): "the arrays have one shape",
  (
    "evidence/p_values",
    "yield row, np.logical_and.reduce([array == v for array, v in zip(arrays, row,"
    " strict=True)]) [True -> False]",
  ): "a row has a value of each array",
  (
    "evidence/p_values",
    "z = (losses.mean(axis=0) - tolerance) * np.sqrt(size) / np.where(has_spread, spread, 1.0)"
    " [1.0 -> 2.0]",
  ): "z is not read where there is no spread",
  (
    "evidence/p_values",
    "return _finish(np.where(has_spread, special.log_ndtr(z), 0.0), log) [0.0 -> 1.0]",
  ): "log p is cut at 0 afterwards",
  (
    "evidence/multiple_testing",
    "adjusted = np.ones(len(p_values)) [ones -> zeros]",
  ): "all entries are set",
  (
    "evidence/multiple_testing",
    "weights = np.where(open_, weights + weights[chosen] * edges[chosen], 0.0) [0.0 -> 1.0]",
  ): "weights of closed hypotheses are not read",
  (
    "evidence/multiple_testing",
    "np.fill_diagonal(edges, 0.0) [0.0 -> 1.0]",
  ): "the diagonal is not read",
  (
    "evidence/multiple_testing",
    "joined, loops[:, None], out=np.zeros_like(edges), where=loops[:, None] > 1e-12"
    " [Gt -> GtE]",
  ): "1 minus a float is a multiple of 2**-54, which 1e-12 is not",
  **dict.fromkeys(
    [
      ("evidence/betting", f"_BLOCK, _PAIRS, _HEDGED_PAIRS = 64, 1024, 8192 [{change}]")
      for change in ("64 -> 65", "1024 -> 1025", "8192 -> 8193")
    ]
    + [
      ("evidence/betting", f"_CELLS = 2**16 [{change}]")
      for change in ("Pow -> Mult", "2 -> 3", "16 -> 17")
    ]
    + [
      ("evidence/betting", f"size = max(_BLOCK, _CELLS // max(1, len(columns))) [{change}]")
      for change in ("max -> min", "1 -> 2")
    ],
    "how much is followed at once decides memory and seconds, not what is found",
  ),
  (
    "evidence/betting",
    "columns = losses.reshape(len(losses), -1) [1 -> 2]",
  ): "numpy takes any negative number for what is left",
  (
    "evidence/betting",
    "squares, reached = strategies.squares_before(losses), np.zeros(len(columns), bool)"
    " [zeros -> ones]",
  ): "all entries are set",
  (
    "promises/promise",
    "__test__: ClassVar[bool] = False  # no test of pytest's [False -> True]",
  ): "for pytest's collection alone",
  (
    "promises/quantile",
    'return (Test("", round(1.0 - self.share, 12), Support(binary=True)),) [12 -> 13]',
  ): "another number only where a share has more than 12 digits",
  (
    "promises/risks",
    "pairs = zip(self.names, self.tolerances, strict=True) [True -> False]",
  ): "there are as many tolerances as names, which is checked before",
  (
    "generations/order",
    "return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))"
    " [True -> False]",
  ): "there are as many ends as starts",
  (
    "evidence/strategies",
    "self._prior = HEDGE_PRIOR_SIZE * scale**2 * share * (1.0 - share) + self.wealth"
    " [Add -> Sub]",
  ): "wealth is 0 there and gives its shape alone",
  (
    "evidence/strategies",
    "self._cap = design.cap + self.wealth [Add -> Sub]",
  ): "wealth is 0 there and gives its shape alone",
  (
    "evidence/strategies",
    "if len(gains) <= _LOOKS: [LtE -> Lt]",
  ): "either way gives the same sums",
  (
    "evidence/p_values",
    "cdf = np.asarray(np.where(counts < sizes, incomplete, 1.0)) [1.0 -> 2.0]",
  ): "log p is cut at 0 afterwards",
  **dict.fromkeys(
    [
      ("configurations", f"if not 0.0 < error_rate < 1.0: [{change}]")
      for change in ("Lt -> LtE", "1.0 -> 2.0")
    ],
    "the test refuses it in the same words",
  ),
  (
    "configurations",
    "promise.names, promise.tolerances, found.evidence, strict=True [True -> False]",
  ): "each risk has a name, a tolerance and its evidence",
}
