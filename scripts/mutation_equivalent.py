"""Mutants of `calm.calibrate` that no test can see, each with why.

`mutation_check.py` counts them apart.
A key is a module and the text of the line with what was done to it; a line that is edited loses
its entry, which tests/scripts/mutation_check_test.py tells.
"""

EQUIVALENT: dict[tuple[str, str], str] = {
  (
    "p_values",
    "tiny = ~(cdf > _TINY) [Gt -> GtE]",
  ): "the table gives the same number there",
  (
    "p_values",
    "log_cdf = np.array(np.log(np.where(tiny, 1.0, cdf))) [1.0 -> 2.0]",
  ): "the table replaces these entries",
  (
    "p_values",
    "if np.any(sizes < 1) or np.any(sizes != np.floor(sizes)): [floor -> ceil]",
  ): "whole numbers are those that either leaves alone",
  (
    "p_values",
    "snapped = np.abs(sums - nearest) <= _SNAP * np.maximum(1.0, nearest) [1.0 -> 2.0]",
  ): "other sums next to 0 and 1 only, where Bentkus's term is above Hoeffding's: at 1 that is"
  " n d (1 - d)^(n - 1) / (1 - 1 / n)^(n - 1), at most e times P(B = 1)",
  (
    "p_values",
    "for row in dict.fromkeys(zip(*(array.ravel().tolist() for array in arrays), strict=True)):"
    " [True -> False]",
  ): "the arrays have one shape",
  (
    "p_values",
    "yield row, np.logical_and.reduce([array == v for array, v in zip(arrays, row,"
    " strict=True)]) [True -> False]",
  ): "a row has a value of each array",
  (
    "testing",
    "adjusted, visited, highest = np.ones(len(p_values)), [], 0.0 [ones -> zeros]",
  ): "all entries are set",
  **dict.fromkeys(
    [
      ("betting", f"_BLOCK, _PAIRS, _HEDGED_PAIRS = 64, 1024, 8192 [{change}]")
      for change in ("64 -> 65", "1024 -> 1025", "8192 -> 8193")
    ]
    + [
      ("betting", f"_CELLS = 2**16 [{change}]")
      for change in ("Pow -> Mult", "2 -> 3", "16 -> 17")
    ]
    + [
      ("betting", f"size = max(_BLOCK, _CELLS // max(1, len(columns))) [{change}]")
      for change in ("max -> min", "1 -> 2")
    ],
    "how much is followed at once decides memory and seconds, not what is found",
  ),
  (
    "betting",
    "columns = losses.reshape(len(losses), -1) [1 -> 2]",
  ): "numpy takes any negative number for what is left",
  (
    "betting",
    "squares, reached = _squares_before(losses), np.zeros(len(columns), bool) [zeros -> ones]",
  ): "all entries are set",
  (
    "risks",
    "__test__: ClassVar[bool] = False  # no test of pytest's [False -> True]",
  ): "for pytest's collection alone",
  (
    "risks",
    'return (Test("", round(1.0 - self.share, 12), Support(binary=True)),) [12 -> 13]',
  ): "another number only where a share has more than 12 digits",
  (
    "risks",
    "pairs = zip(self.names, self.tolerances, strict=True) [True -> False]",
  ): "there are as many tolerances as names, which is checked before",
  (
    "generations/order",
    "return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))"
    " [True -> False]",
  ): "there are as many ends as starts",
  (
    "betting",
    "self._prior = HEDGE_PRIOR_SIZE * scale**2 * share * (1.0 - share) + self.wealth"
    " [Add -> Sub]",
  ): "wealth is 0 there and gives its shape alone",
  (
    "betting",
    "self._cap = design.cap + self.wealth [Add -> Sub]",
  ): "wealth is 0 there and gives its shape alone",
  (
    "betting",
    "if len(gains) <= _LOOKS: [LtE -> Lt]",
  ): "either way gives the same sums",
  (
    "p_values",
    "cdf = np.asarray(np.where(counts < sizes, incomplete, 1.0)) [1.0 -> 2.0]",
  ): "log p is cut at 0 afterwards",
}
