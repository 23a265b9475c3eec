"""From p-values of parts to what is certified, by hand."""

import numpy as np

from calm.calibrate import Support
from calm.calibrate.decision import Evidence, decide


def part(p_values, share=1.0, ascending=False):
  many = len(p_values)
  return Evidence(
    name="",
    tolerance=0.1,
    method="betting",
    support=Support(),
    share=share,
    ascending=ascending,
    num_examples=(9,) * many,
    means=(0.0, float("nan"), 0.5)[:many],
    log_p_values=tuple(np.log(p_values).tolist()),
    upper_bounds=(0.2,) * many,
  )


def check(found, p_values, worst, rejected, adjusted, visited):
  np.testing.assert_allclose(np.exp(found.log_p_values), p_values, rtol=1e-12)
  np.testing.assert_allclose(found.adjusted_p_values, adjusted, rtol=1e-12)
  assert found.worst.tolist() == worst and found.rejected.tolist() == rejected
  assert found.visited == visited


def test_the_worst_part_decides():
  parts = [part([0.01, 0.02, 0.2]), part([0.03, 0.01, 0.04])]
  found = decide(parts, "fixed_sequence", 0.05)
  largest = [0.03, 0.02, 0.2]
  check(found, largest, [1, 0, 0], [True, True, False], [0.03, 0.03, 0.2], (0, 1, 2))


def test_what_is_tested_from_either_end_has_shares_and_needs_both():
  risk = part([0.01, 0.02, 0.024], share=0.5)
  costs = [
    part([0.4, 0.012, 0.006], share=0.5, ascending=True),
    part([0.5, 0.01, 0.008], share=0.5, ascending=True),
  ]
  found = decide([risk, *costs], "fixed_sequence", 0.05)
  # Over its share, a p-value of 1/2 is 1. Costs are accumulated from the last threshold up.
  largest, adjusted = [1.0, 0.04, 0.048], [1.0, 0.04, 0.048]
  check(found, largest, [2, 0, 0], [False, True, True], adjusted, (0, 1, 2))
  found = decide([part([0.01, 0.02, 0.3], share=0.5), *costs], "fixed_sequence", 0.05)
  check(found, [1.0, 0.04, 0.6], [2, 0, 0], [False, True, False], [1.0, 0.04, 0.6], (0, 1, 2))


def test_a_cost_that_fails_at_the_cheap_end_ends_the_test_of_costs():
  cost = part([0.001, 0.001, 0.02], share=0.25, ascending=True)
  found = decide([part([0.001] * 3, share=0.75), cost], "fixed_sequence", 0.05)
  assert not found.rejected.any()
  np.testing.assert_allclose(found.adjusted_p_values, 0.08)


def test_a_share_of_the_error_rate_is_a_higher_p_value():
  assert not decide([part([0.03], share=0.5)], "fixed_sequence", 0.05).rejected[0]
  assert decide([part([0.025], share=0.5)], "fixed_sequence", 0.0500001).rejected[0]


def test_evidence_is_the_same_after_a_file():
  first = part([0.5, 0.25, 0.125], share=0.5, ascending=True)
  stored = first.to_json()
  assert stored["means"] == [0.0, None, 0.5] and stored["num_examples"] == [9, 9, 9]
  again = Evidence.from_json(stored)
  assert repr(again) == repr(first)
