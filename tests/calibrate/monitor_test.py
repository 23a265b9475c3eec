import itertools
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from calm.calibrate import Support
from calm.calibrate import monitor as monitor_lib
from calm.calibrate.generations.records import GenerationsError
from tests.calibrate import laws


def watch(**changes):
  fields = dict(tolerance=0.1, alarm_level=0.05, sampling_rate=0.5, seed="coin")
  return monitor_lib.Watch(**{**fields, **changes})


def final(losses, watched):
  wealth = monitor_lib.Wealth()
  for loss in losses:
    wealth = wealth.after(float(loss), watched)
  return wealth


@pytest.mark.parametrize(
  ("values", "chances"),
  [
    ((0.0, 1.0), (0.7, 0.3)),
    ((0.0, 0.5, 1.0), (0.5, 0.4, 0.1)),
    ((-1.0, 0.0, 1.0), (0.2, 0.5, 0.3)),
  ],
)
def test_false_alarms_by_enumeration(values, chances):
  """At the boundary wealth is a martingale, so it ever reaches 1 / u with chance at most u."""
  size = 7
  mean = float(np.dot(values, chances))
  watched = watch(tolerance=mean, support=Support(lower=min(values)))
  ends, peaks, weights = [], [], []
  for path in itertools.product(range(len(values)), repeat=size):
    wealth = final(np.array(values)[list(path)], watched)
    ends.append(math.exp(wealth.log_wealth))
    peaks.append(math.exp(wealth.highest))
    weights.append(np.prod(np.array(chances)[list(path)]))
  weights, peaks = np.array(weights), np.array(peaks)
  assert np.dot(ends, weights) == pytest.approx(1.0)
  for level in (0.05, 0.2, 0.5, 0.8):
    assert weights[peaks >= 1 / level].sum() <= level + 1e-12


@pytest.mark.parametrize("law", [laws.bernoulli, laws.mostly_zero, laws.signed])
def test_alarms_are_rare_while_the_promise_holds_and_sure_when_it_does_not(law):
  support = Support(lower=-1.0 if law is laws.signed else 0.0)
  watched = watch(alarm_level=0.1, support=support)
  for mean, expect_alarm in ((0.1, False), (0.35, True)):
    generator = np.random.default_rng(3)
    alarms = 0
    for _ in range(60):
      wealth = final(law(generator, mean, 300), watched)
      alarms += wealth.highest >= math.log(10)
    if expect_alarm:
      assert alarms >= 55
    else:
      assert stats.binomtest(alarms, 60, 0.1, alternative="greater").pvalue > 1e-3


def test_a_good_past_does_not_hide_a_bad_present():
  generator = np.random.default_rng(0)
  losses = np.concatenate(
    [laws.bernoulli(generator, 0.02, 3000), laws.bernoulli(generator, 0.4, 600)]
  )
  assert final(losses[:3000], watch()).highest < math.log(20)
  assert final(losses, watch()).highest >= math.log(20)


def test_wealth_stays_positive_at_the_lowest_losses():
  for lower in (0.0, -1.0):
    watched = watch(support=Support(lower=lower))
    assert math.isfinite(final([1.0] * 5 + [lower] * 500, watched).log_wealth)
    cap = 0.5 / (0.1 - lower)
    assert monitor_lib.Wealth(mean=0.2, square=0.04).bet(watched) == pytest.approx(cap)


def test_bets_by_hand():
  watched = watch(tolerance=0.1)
  assert monitor_lib.Wealth().bet(watched) == 0.0
  wealth = monitor_lib.Wealth(mean=0.2, square=0.25)
  assert wealth.bet(watched) == pytest.approx(0.1 / (0.25 - 0.04 + 0.01))
  after = wealth.after(1.0, watched)
  # Of three quarters of the weight a share waits, all else begins at once.
  waiting = 0.75 * math.log(2) / math.log(3)
  factor = 1 + 0.1 / 0.22 * 0.9
  assert after.log_wealth == pytest.approx(math.log((1 - waiting) * factor + waiting))
  second = after.after(0.4, watched)
  gain = 1 + after.bet(watched) * 0.3
  later = 0.75 * math.log(2) / math.log(4)
  by_hand = ((1 - waiting) * factor + waiting - later) * gain + later
  assert second.log_wealth == pytest.approx(math.log(by_hand))
  alone = monitor_lib.Wealth(mean=0.2, square=0.25, restarts=False).after(1.0, watched)
  assert alone.log_wealth == pytest.approx(math.log(factor))
  assert after.mean == pytest.approx(0.6) and after.square == pytest.approx(0.625)


def test_the_coin_is_fair_recorded_and_blind():
  for rate in (0.1, 0.5):
    watched = watch(sampling_rate=rate)
    flips = [watched.sampled(number) for number in range(4000)]
    assert stats.binomtest(sum(flips), 4000, rate).pvalue > 1e-4
    assert flips == [watched.sampled(number) for number in range(4000)]
  assert all(watch(sampling_rate=1.0).sampled(number) for number in range(100))
  other = [watch(seed="other").sampled(number) for number in range(100)]
  assert other != [watch().sampled(number) for number in range(100)]


def test_state_survives_restarts_and_kills(tmp_path):
  path = tmp_path / "monitor.jsonl"
  watched = watch(calibration_digest="abc")
  generator = np.random.default_rng(0)
  monitor = monitor_lib.open_monitor(path, watched)
  plain = monitor_lib.Wealth()
  for step in range(200):
    number, check = monitor.serve()
    assert number == step and check == watched.sampled(number)
    if check:
      loss = float(generator.random() < 0.3)
      monitor.record(number, loss)
      plain = plain.after(loss, watched)
    if step % 50 == 7:
      path.write_bytes(path.read_bytes() + b'{"served": 9')  # killed while it wrote
      monitor = monitor_lib.open_monitor(path, watched)
  assert monitor.wealth == plain and monitor.served == 200
  assert monitor.p_value == pytest.approx(math.exp(-plain.highest))
  assert monitor.alarm == (plain.highest >= math.log(20)) and "ALARM" in repr(monitor)
  assert "quiet" in repr(monitor_lib.open_monitor(tmp_path / "new.jsonl", watched))


def test_late_losses_count_in_the_order_of_serving(tmp_path):
  monitor = monitor_lib.open_monitor(tmp_path / "a.jsonl", watch(sampling_rate=1.0))
  for _ in range(3):
    monitor.serve()
  monitor.record(2, 1.0)
  assert monitor.wealth == monitor_lib.Wealth() and monitor.waiting == (0, 1, 2)
  monitor.record(0, 0.0)
  assert monitor.wealth.count == 1 and monitor.waiting == (1, 2)
  monitor.record(1, 0.5)
  assert monitor.wealth == final([0.0, 0.5, 1.0], monitor.watch) and monitor.waiting == ()
  again = monitor_lib.open_monitor(tmp_path / "a.jsonl", watch(sampling_rate=1.0))
  assert again.wealth == monitor.wealth


def test_the_full_model_runs_on_the_sampled_prompts_alone(tmp_path):
  monitor = monitor_lib.open_monitor(tmp_path / "a.jsonl", watch())
  asked = []

  def full_model(rows):
    asked.append(rows)
    return ["a b c" if row % 3 else "else" for row in rows]

  alarms = [monitor.check(["a b c"] * 20, full_model) for _ in range(8)]
  picked = [number for number in range(160) if watch().sampled(number)]
  assert [20 * i + row for i, rows in enumerate(asked) for row in rows] == picked
  losses = [0.0 if number % 20 % 3 else 1.0 for number in picked]
  assert monitor.wealth == final(losses, watch()) and monitor.served == 160
  # A third of the outputs differ, not a tenth.
  assert alarms == sorted(alarms) and not alarms[0] and monitor.alarm and not monitor.waiting
  assert monitor_lib.open_monitor(tmp_path / "a.jsonl", watch()).wealth == monitor.wealth


def test_the_full_model_is_not_called_for_nothing_and_its_answers_are_counted(tmp_path):
  rare = monitor_lib.open_monitor(tmp_path / "a.jsonl", watch(sampling_rate=1e-9))
  assert not rare.check(["x"] * 5, lambda rows: pytest.fail("called")) and rare.served == 5
  all_of_them = monitor_lib.open_monitor(tmp_path / "b.jsonl", watch(sampling_rate=1.0))
  with pytest.raises(ValueError, match="each of the 2 positions, got 1"):
    all_of_them.check(["x", "y"], lambda rows: ["x"])
  assert all_of_them.waiting == (0, 1)
  all_of_them.record(0, 0.0)  # losses that never come count as the lowest
  all_of_them.record(1, 0.0)
  assert not all_of_them.check(["x"], lambda rows: ["x"], "exact_match")
  signed = watch(kind="risk_signed", support=Support(lower=-1.0))
  with pytest.raises(ValueError, match=r"got one on 'risk_signed'; use `serve`"):
    monitor_lib.open_monitor(tmp_path / "c.jsonl", signed).check(["x"], lambda rows: ["x"])


def test_misuse_is_refused(tmp_path):
  monitor = monitor_lib.open_monitor(tmp_path / "a.jsonl", watch(sampling_rate=1.0))
  monitor.serve()
  for number, loss, message in (
    (5, 0.0, "`number` to be a sampled prompt"),
    (0, 1.5, "`loss` to lie in the declared range"),
    (0, math.nan, "`loss` to lie in the declared range"),
  ):
    with pytest.raises(ValueError, match=message):
      monitor.record(number, loss)
  monitor.record(0, 0.0)
  with pytest.raises(ValueError, match="`number`"):
    monitor.record(0, 0.0)
  for changes in (
    {"tolerance": 0.0},
    {"tolerance": 1.0},
    {"alarm_level": 1.0},
    {"sampling_rate": 0.0},
    {"sampling_rate": 1.1},
    {"tolerance": -1.0, "support": Support(lower=-1.0)},
  ):
    with pytest.raises(ValueError, match=r"to be in \("):
      watch(**changes)


def test_damage_is_named(tmp_path):
  path = tmp_path / "a.jsonl"
  monitor_lib.open_monitor(path, watch()).serve()
  with pytest.raises(
    GenerationsError, match=r"a.jsonl:1: expected the watch .*, got .*; start a new file"
  ):
    monitor_lib.open_monitor(path, watch(tolerance=0.2))
  good = path.read_text()
  for line in (
    '{"served": 5, "sampled": true}',
    '{"number": 77, "loss": 0.1}',
    '{"loss": 0.1}',
  ):
    path.write_text(good + line + "\n")
    with pytest.raises(
      GenerationsError, match=r"a.jsonl:3: expected a line of this monitor, got another"
    ):
      monitor_lib.open_monitor(path, watch())
  path.write_text("\n")
  with pytest.raises(
    GenerationsError, match=r"a.jsonl:1: expected the watch .*, got .*; start a new file"
  ):
    monitor_lib.open_monitor(path, watch())


def first_alarm(losses, watched, **start):
  wealth = monitor_lib.Wealth(**start)
  for number, loss in enumerate(losses.tolist(), start=1):
    wealth = wealth.after(loss, watched)
    if wealth.highest >= math.log(1 / watched.alarm_level):
      return number
  return math.inf


def test_a_long_good_time_delays_an_alarm_little():
  """Wealth that bleeds for long makes the first gambler late, not those who begin later."""
  delays = []
  for seed in range(5):
    generator = np.random.default_rng(seed)
    good = laws.bernoulli(generator, 0.085, 12_000)
    bad = laws.bernoulli(generator, 0.2, 4000)
    losses = np.concatenate([good, bad])
    late, alone = (
      first_alarm(losses, watch(), restarts=restarts) - len(good) for restarts in (True, False)
    )
    fresh = first_alarm(bad, watch())
    assert 0 < late <= alone
    delays.append((fresh, late, alone))
  fresh, late, alone = np.median(delays, axis=0)
  assert late < 6 * fresh and late < alone


def test_all_weights_sum_to_one():
  for restarts in (True, False):
    weights = [math.exp(monitor_lib._log_weight(k, restarts)) for k in range(2000)]
    waiting = math.exp(monitor_lib._log_waiting(2000, restarts))
    assert math.fsum(weights) + waiting == pytest.approx(1.0, abs=1e-12)


def test_a_file_from_before_restarts_goes_on_as_it_was(tmp_path):
  path = tmp_path / "a.jsonl"
  monitor = monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  losses = [1.0, 0.0, 1.0, 1.0]
  for loss in losses:
    monitor.record(monitor.serve()[0], loss)
  path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
  again = monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  plain = monitor_lib.Wealth(restarts=False)
  for loss in losses:
    plain = plain.after(loss, watch())
  assert again.wealth == plain != monitor.wealth


def test_the_coin_may_go_by_ids(tmp_path):
  monitor = monitor_lib.open_monitor(tmp_path / "a.jsonl", watch())
  names = [f"id-{i}" for i in range(50)]
  asked = []
  monitor.check(["x"] * 50, lambda rows: asked.extend(rows) or ["x"] * len(rows), names=names)
  assert asked == [i for i, name in enumerate(names) if watch().sampled(name)]
  assert 10 < len(asked) < 40 and monitor.served == 50


def test_an_id_is_bet_on_once(tmp_path):
  """A list that was served 20 or 60 times at risk = tolerance gave 21 and 26 % false alarms."""
  path, names = tmp_path / "a.jsonl", [f"id-{i}" for i in range(40)]
  full = lambda rows: ["a" if row % 2 else "b" for row in rows]
  texts = ["a"] * 40
  monitor = monitor_lib.open_monitor(path, watch())
  monitor.check(texts, full, names=names)
  once, picked = monitor.wealth, len([name for name in names if watch().sampled(name)])
  assert once.count == picked > 10 and monitor.repeated == 0
  for again in range(1, 4):
    del monitor
    monitor = monitor_lib.open_monitor(path, watch())  # ids are kept from run to run
    monitor.check(texts, full, names=names)
    assert monitor.wealth == once and not monitor.waiting
    assert monitor.served == 40 * (again + 1) and monitor.repeated == again * picked
  monitor.check(texts, full, names=[f"new {name}" for name in names])
  assert monitor.wealth.count > once.count
  assert not any(name in path.read_text() for name in names)
  count = monitor.wealth.count
  monitor.check(["a"] * 3, full, names=["twice"] * 3)  # in one batch too
  assert monitor.wealth.count - count == watch().sampled("twice")


def serve_list_at_the_boundary(losses, name_of):
  """Whether a monitor alarms while one list, whose mean loss is the tolerance's, is served."""
  monitor = monitor_lib.Monitor(pathlib.Path("in memory"), watch(sampling_rate=1.0))
  for serving in range(60):
    for row, loss in enumerate(losses):
      number, sampled = monitor.serve(name_of(serving, row))
      if sampled and monitor.record(number, loss):
        return True
  return False


def test_serving_one_list_sixty_times_alarms_no_more_often_than_serving_it_once(monkeypatch):
  """80 lists of 20 draws at risk = tolerance: betting on every serving alarms in a third."""
  monkeypatch.setattr(monitor_lib.Monitor, "_write", lambda *_: None)  # no file, for speed
  lists = laws.bernoulli(np.random.default_rng(0), 0.1, (80, 20)).tolist()
  same, new = (
    sum(serve_list_at_the_boundary(losses, name_of) for losses in lists)
    for name_of in (lambda _, row: f"id-{row}", lambda serving, row: f"{serving}/{row}")
  )
  most = stats.binom.ppf(0.999, len(lists), watch().alarm_level)
  assert same <= most < new / 1.5


def test_a_file_without_ids_goes_on(tmp_path):
  path = tmp_path / "a.jsonl"
  monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  line = '{"served": 0, "sampled": true}\n{"number": 0, "loss": 0.5}\n'
  path.write_text(path.read_text() + line)
  monitor = monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  assert monitor.wealth == final([0.5], monitor.watch) and monitor.repeated == 0
  assert monitor.serve("a") == (1, True) and monitor.serve("a") == (2, False)


def test_what_a_full_disk_left_is_taken_out(tmp_path):
  path = tmp_path / "a.jsonl"
  monitor = monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  for loss in (0.0, 1.0, 0.5):
    monitor.record(monitor.serve()[0], loss)
  whole = path.read_text()
  lines = whole.splitlines(keepends=True)
  glued = [
    *lines[:3],
    lines[3][:9] + lines[3],
    lines[4][:3] + lines[4],
    *lines[5:],
    lines[5][:7],
  ]
  path.write_text("".join(glued))
  again = monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  assert again.wealth == monitor.wealth and path.read_text() == whole


def test_a_second_process_is_refused_by_name_until_the_first_lets_go(tmp_path):
  path = tmp_path / "a.jsonl"
  script = (
    "import sys; from calm.calibrate import monitor as monitor_lib\n"
    "watch = monitor_lib.Watch(0.1, 0.05, 1.0, 'coin')\n"
    "try: monitor_lib.open_monitor(sys.argv[1], watch).serve()\n"
    "except OSError as error: print(error)\n"
  )

  def other():
    made = subprocess.run(
      [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    return made.stdout

  monitor = monitor_lib.open_monitor(path, watch(sampling_rate=1.0))
  monitor.serve()
  assert f"process {os.getpid()}" in other()
  assert path.read_text().count("served") == 1
  del monitor
  (tmp_path / ".a.jsonl.lock").write_text('{"process": "00000000-1-1"}')  # of a killed one
  assert other() == "" and path.read_text().count("served") == 2
