"""Hypothesis draws the same examples in every run and does not watch the
clock.
"""

import hypothesis

hypothesis.settings.register_profile(
  "calibrate",
  deadline=None,
  derandomize=True,
  database=None,
  max_examples=80,
  # A busy machine draws slowly: that is no failure, and no killed mutant.
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("calibrate")
