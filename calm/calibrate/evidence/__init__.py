"""What losses prove: p-values, confidence bounds and the tests that share an error rate."""

__all__ = [
  "betting",
  "bounds",
  "draws",
  "methods",
  "multiple_testing",
  "p_values",
  "pareto",
]
