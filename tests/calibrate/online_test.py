"""A threshold that is calibrated while it serves: bets, draws, delays, alarms,
its file.
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from calm import storage
from calm.calibrate import NEVER_EXIT, Online, Support, online

GRID = [0.9, 0.6, 0.3]
RATES = {"tolerance": 0.1, "error_rate": 0.05}


def serve(state, count, *risks, start=0, seed=0):
  """Serves prompts with losses of 0 or 1 at these risks; returns the thresholds
  it named.
  """
  generator = np.random.default_rng(seed)
  named = []
  for number in range(start, start + count):
    named.append(state.threshold)
    losses = (generator.random() < np.array(risks)) * 1.0
    if state.should_check(number):
      state.observe(number, dict(zip(GRID, losses.tolist(), strict=True)))
  return named


def wealth_by_hand(losses, tolerance, worst=1.0):
  bets = [0.99 * 0.5**k / (worst - tolerance) for k in range(6)]
  weights = [0.6**k / sum(0.6**j for j in range(6)) for k in range(6)]
  factors = [
    math.prod(1.0 + bet * (tolerance - loss) for loss in losses) for bet in bets
  ]
  return sum(
    weight * factor for weight, factor in zip(weights, factors, strict=True)
  )


@pytest.mark.parametrize("restarts", [False, True])
def test_wealth_has_expectation_one_at_the_bound(restarts):
  """Over all paths of 0 and 1: with probabilities tolerance and 1 -
  tolerance.
  """
  length = 10
  tolerance = 0.3
  paths = (np.arange(2**length)[:, None] >> np.arange(length)) & 1
  sign = -1.0 if restarts else 1.0  # the alarm bets on the reverse
  wealth = online.Wealth(
    1.0 / (tolerance if restarts else 0.7), (len(paths),), restarts
  )
  for column in paths.T:
    wealth.bet(sign * (tolerance - column))
  log = np.logaddexp.reduce(wealth._log, axis=-1)
  if restarts:
    log = np.logaddexp(log, online._log_waiting(length))
  chance = np.prod(np.where(paths, tolerance, 1.0 - tolerance), axis=1)
  assert np.sum(chance * np.exp(log)) == pytest.approx(1.0, abs=1e-12)
  assert np.sum(chance * (wealth.highest >= math.log(20.0))) <= 0.05


def alarm_by_hand(losses, tolerance, low):
  """A quarter of the weight begins with the first loss, the rest with any."""
  late = [
    0.75 * math.log(2.0) / math.log(k + 2.0) for k in range(len(losses) + 1)
  ]
  begun = [
    wealth_by_hand(losses[k:], tolerance, low) for k in range(len(losses))
  ]
  return 0.25 * begun[0] + late[-1] + np.dot(-np.diff(late), begun)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_wealth_is_its_formula_and_the_alarm_comes_where_it_reaches_the_level(
  low,
):
  state = Online(None, [0.5], **RATES, support=Support(low), least_share=1.0)
  served = []
  for number, bad in enumerate(np.random.default_rng(3).random(200) < 0.6):
    assert state.should_check(number)
    wealth = wealth_by_hand([0.0] * number, 0.1)
    assert served or state._wealth.highest == pytest.approx(math.log(wealth))
    if state.threshold == 0.5:
      served.append(float(bad))
    state.observe(number, {0.5: served[-1] if served else 0.0})
    assert state.life == (
      bool(served) and alarm_by_hand(served, 0.1, low) >= 20.0
    )
    if state.life:
      break
  assert state.life == 1 and len(served) > 3


def test_lives_share_the_error_rate():
  levels = [online.life_level(0.05, life) for life in range(100_000)]
  assert levels[0] == pytest.approx(0.04) and sum(levels) == pytest.approx(
    0.05, rel=1e-4
  )


def test_it_serves_the_safe_setting_first_and_lowers_it_as_far_as_it_may():
  state = Online(None, GRID, **RATES)
  assert (
    "No threshold is certified now: the safe setting is served"
    in state.guarantee
  )
  named = serve(state, 4000, 0.0, 0.03, 0.2)
  assert named[0] == NEVER_EXIT and state.threshold == 0.6 and state.life == 0
  assert named == sorted(named, reverse=True) and set(named) == {
    NEVER_EXIT,
    0.9,
    0.6,
  }
  assert 38 <= named.index(0.9) <= 40  # losses of 0 alone
  sentence = state.guarantee
  assert (
    "at least 0.95 over the whole life" in sentence
    and "it names 0.6 since" in sentence
  )
  assert f"{state.checked} of 4000 served prompts were checked" in sentence


def test_the_share_falls_when_nothing_new_is_certified():
  state = Online(None, GRID, **RATES, share=0.8, least_share=0.1)
  shares = []
  named = NEVER_EXIT
  since = 0
  for number in range(12_000):
    shares.append(state.share)
    idle = max(1, state.checked - since)
    assert state.share == max(0.1, 0.8 * min(1.0, 300 / idle))
    if state.should_check(number):
      state.observe(number, {**dict.fromkeys(GRID, 1.0), 0.9: 0.0})
    if state.threshold != named:
      named = state.threshold
      since = state.checked
  assert named == 0.9 and since > 0
  assert (
    shares[0] == 0.8
    and shares[-1] == 0.1
    and shares == sorted(shares, reverse=True)
  )
  assert state.checked == pytest.approx(
    sum(shares), abs=4 * math.sqrt(sum(shares))
  )
  done = Online(None, [0.5], **RATES, least_share=0.2)
  for number in range(60):
    if done.should_check(number):
      done.observe(number, {0.5: 0.0})
  assert done.threshold == 0.5 and done.share == 0.2


def test_an_id_counts_once():
  state = Online(None, [0.5], **RATES)
  for _ in range(3):
    for number in range(20):
      if state.should_check(number):
        state.observe(number, {0.5: 0.0})
        assert not state.should_check(number)
        state.observe(number, {0.5: 0.0})
  assert (state.checked, state.served, state.threshold) == (20, 80, NEVER_EXIT)


def test_late_losses_count_in_the_order_of_serving():
  losses = (np.random.default_rng(1).random(300) < 0.04) * 1.0
  at_once, late = (
    Online(None, [0.5], **RATES, least_share=1.0) for _ in range(2)
  )
  for number, loss in enumerate(losses):
    assert at_once.should_check(number) and late.should_check(number)
    at_once.observe(number, {0.5: float(loss)})
  for place, number in enumerate(
    np.random.default_rng(2).permutation(300).tolist()
  ):
    assert late.missing == 300 - place
    late.observe(number, {0.5: float(losses[number])})
  assert late.threshold == at_once.threshold == 0.5 and late.missing == 0
  np.testing.assert_array_equal(late._wealth.highest, at_once._wealth.highest)


def test_a_loss_that_never_comes_is_the_worst():
  known, unknown, lost = (
    Online(None, [0.5], **RATES, patience=5) for _ in range(3)
  )
  for number in range(30):
    for state in (known, unknown, lost):
      state.should_check(number)
      if number != 3:  # rounding is put back into the range
        state.observe(number, {0.5: -1e-9 if state is known else 0.0})
      elif state is not lost:
        state.observe(number, None if state is unknown else {0.5: 1.0 + 1e-9})
    assert lost.missing == (3 <= number < 8)  # until 5 later ones were drawn
  assert lost.checked == 30 and lost.missing == 0
  for state in (unknown, lost):
    np.testing.assert_array_equal(state._wealth.highest, known._wealth.highest)
  lost.observe(3, {0.5: 0.0})  # too late
  assert lost.checked == 30


def test_drift_raises_an_alarm_and_the_safe_setting_is_served_at_once():
  state = Online(None, GRID, **RATES)
  serve(state, 2000, 0.0, 0.0, 0.02)
  assert state.threshold == 0.3
  named = serve(state, 6000, 0.0, 0.5, 0.6, start=2000)
  steps = [
    level for place, level in enumerate(named) if level != named[place - 1]
  ]
  assert (
    state.life == 1
    and steps[-2:] == [NEVER_EXIT, 0.9]
    and state.threshold == 0.9
  )
  assert state.checked > 0 and "Alarms so far: 1; nothing is" in state.guarantee
  # Losses of before the alarm, and draws whose losses come after it, count no
  # more.
  assert state._wealth.highest[1] < 3.0


def test_losses_that_are_none_change_nothing(tmp_path):
  state = Online(tmp_path / "s", GRID, **RATES)
  assert (
    state.should_check("a")
    and state.wanted("a") == tuple(GRID)
    and not state.wanted("b")
  )
  before = (tmp_path / "s").read_bytes()
  for name, losses, message in (
    ("a", {0.9: 0.0}, "threshold 0.6, got nan"),
    ("a", dict.fromkeys(GRID, 1.1), "0.9, got 1.1"),
    ("a", dict.fromkeys(GRID, -0.1), "0.9, got -0.1"),
    ("b", dict.fromkeys(GRID, 0.0), "one that was drawn, got 'b'"),
  ):
    with pytest.raises(ValueError, match=message):
      state.observe(name, losses)
  assert (tmp_path / "s").read_bytes() == before and state.missing == 1


def test_a_state_goes_on_wherever_it_was_stopped(tmp_path):
  path = tmp_path / "state.jsonl"
  risks = (0.0, 0.02, 0.4)
  whole = Online(path, GRID, **RATES)
  serve(whole, 900, *risks)
  lines = path.read_bytes().splitlines(keepends=True)
  del whole
  for count in (1, 2, 3, 300, len(lines)):
    cut = tmp_path / f"{count}.jsonl"
    torn = b'{"observe": "0123' if count % 2 else b""
    cut.write_bytes(b"".join(lines[:count]) + torn)
    state = Online(cut, GRID, **RATES)
    serve(state, 900, *risks)  # all of them again
    again = Online(cut, GRID, **RATES)
    # Of those that were not drawn at first some are drawn now, with losses of
    # their own.
    assert (
      state.threshold == again.threshold == 0.6
      and state.checked == again.checked
    )
    np.testing.assert_array_equal(state._wealth.highest, again._wealth.highest)
    assert cut.read_bytes().startswith(b"".join(lines[:count]))


def test_a_kill_loses_nothing(tmp_path):
  path = tmp_path / "state.jsonl"
  script = (
    "import os, sys\nfrom calm.calibrate import Online\n"
    f"state = Online(sys.argv[1], {GRID}, tolerance=0.1)\n"
    "for n in range(50):\n  if state.should_check(n):\n    if n == 20: "
    "os._exit(9)\n"
    f"    state.observe(n, dict.fromkeys({GRID}, 0.0))\n"
  )
  assert subprocess.run([sys.executable, "-c", script, path]).returncode == 9
  state = Online(path, GRID, **RATES)
  assert (state.checked, state.missing, state.served) == (20, 1, 21)
  assert state.should_check(20)
  state.observe(20, dict.fromkeys(GRID, 0.0))
  assert (state.checked, state.missing) == (21, 0)
  assert state.should_check(21)
  state.give_up()
  assert (state.checked, state.missing) == (22, 0)


def test_settings_out_of_their_range_are_refused():
  Online(None, GRID, **RATES, patience=1)
  for name, value in (
    *(
      ("error_rate", 1.0),
      ("alarm_level", 1.0),
      ("share", 1.1),
      ("least_share", 1.1),
    ),
    *(("patience", 0), ("patience", 2**53)),
  ):
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be in \(0, "):
      Online(None, GRID, **{**RATES, name: value})


def test_a_state_of_other_settings_is_refused(tmp_path):
  path = tmp_path / "state.jsonl"
  Online(path, GRID, tolerance=0.1)  # by default the error rate is 0.05
  before = path.read_bytes()
  for name, value in (
    *(
      ("tolerance", 0.2),
      ("error_rate", 0.1),
      ("thresholds", [0.9]),
      ("share", 0.9),
    ),
    *(
      ("seed", "b"),
      ("about", {"metric": "f1"}),
      ("support", Support(lower=-1.0)),
    ),
  ):
    with pytest.raises(
      storage.FormatError, match=f"state.jsonl:1: expected `{name}`"
    ):
      Online(path, **{"thresholds": GRID, **RATES, name: value})
  assert path.read_bytes() == before


DRAWN = {"draw": "0" * 16, "served": 1}


@pytest.mark.parametrize(
  "lines",
  [
    [{"observe": "0" * 16, "losses": [0.0] * 3}],
    [DRAWN, {"observe": "0" * 16, "losses": [0.0]}],
    [DRAWN, {"observe": "0" * 16, "losses": [0.0, 0.0, True]}],
    [DRAWN, DRAWN],
    [{"draw": "0" * 16, "served": 0}],
    [{"draw": "0" * 16}],
    [{"served": 1, "sampled": True}],
  ],
)
def test_lines_of_something_else_are_refused_by_name(lines, tmp_path):
  path = tmp_path / "state.jsonl"
  Online(path, GRID, **RATES)
  text = path.read_text() + "".join(json.dumps(line) + "\n" for line in lines)
  path.write_text(text)
  with pytest.raises(
    storage.FormatError, match=rf"state.jsonl:{1 + len(lines)}: "
  ):
    Online(path, GRID, **RATES)
  assert path.read_text() == text


def test_it_mends_only_states(tmp_path):
  path = tmp_path / "other.log"
  for raw in (b"first\nsecond", b'{"a": 1}\n{"served', b'{"format": "ca'):
    path.write_bytes(raw)
    with pytest.raises(
      storage.FormatError, match=r"other.log:1: expected a state of"
    ):
      Online(path, GRID, **RATES)
    assert path.read_bytes() == raw
  with pytest.raises(ValueError, match="to be a regular file"):
    Online(tmp_path, GRID, **RATES)
