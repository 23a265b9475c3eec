"""What losses prove: p-values, confidence bounds and the tests that share an error rate."""
