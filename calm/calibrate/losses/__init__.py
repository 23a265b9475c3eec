"""Outputs -> losses: text metrics, their values in parallel, losses per prompt or cluster."""

__all__ = [
  "asking",
  "clusters",
  "metric_values",
  "metrics",
  "sequence_losses",
]
