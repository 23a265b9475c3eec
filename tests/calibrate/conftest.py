"""Hypothesis draws the same examples in every run and does not watch the clock."""

import hypothesis

hypothesis.settings.register_profile(
  "calibrate", deadline=None, derandomize=True, database=None, max_examples=80
)
hypothesis.settings.load_profile("calibrate")
