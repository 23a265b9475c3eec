"""Outputs -> losses: text metrics, their values in parallel, losses per prompt or cluster."""
