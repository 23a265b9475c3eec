"""`calm infer --monitor` without a model: what is checked, what is said, what is refused."""

import argparse
import sys
import types

import pytest

from calm import calibrate
from calm.calibrate import audit, promises
from calm.calibrate.losses import metrics
from calm.commands import monitoring

TEXTS = [f"text {i}" for i in range(40)]
LOSSES = calibrate.SequenceLosses([[0.0]] * 200, [0.5], metric="exact_match")
RISKS = (promises.Risk(LOSSES, 0.3),)
# Every promise, as `calibrate` takes it: that the mean loss is watched for some is told below.
MADE = (
  promises.Mean(),
  promises.Quantile(0.9),
  promises.EveryGroup(labels=["a", "b"] * 100),
  promises.EarlyExits((3.0,), depths=[[1.0]] * 200),
  promises.TailMean(0.9, 0.05),
  promises.KnownMixture(2.0, weights=[1.0] * 200),
  promises.SeveralRisks(risks=RISKS),
  promises.Cost(0.5, 0.3, costs=[[0.1]] * 200),
  promises.Configurations(risks=RISKS, configurations=("a",), costs=(1.0,)),
)


@pytest.fixture(scope="module")
def promise():
  zeros = [[0.0] for _ in range(60)]
  made = calibrate.calibrate(zeros, [0.5], tolerance=0.1, error_rate=0.05, method="paper")
  return types.SimpleNamespace(
    **{**vars(made), "kind": "textual", "metric": "exact_match"}, to_json=made.to_json
  )


class Full:
  """A model whose full-depth text is the prompt, and who keeps what it was asked."""

  def __init__(self, calibration, elsewhere=""):
    self.calibration, self.asked, self.platform_mismatch = calibration, [], elsewhere

  def generate(self, texts, threshold):
    assert threshold == calibrate.NEVER_EXIT
    self.asked += texts
    return [types.SimpleNamespace(text=text) for text in texts]


def arguments(*options):
  parser = argparse.ArgumentParser()
  monitoring.add_arguments(parser)
  return parser.parse_args([str(option) for option in options])


def serve(monitored, texts, ids="id"):
  prompts = [calibrate.Prompt(f"{ids}-{text}", text) for text in TEXTS]
  monitored.check(prompts, [types.SimpleNamespace(text=text) for text in texts])


def test_a_share_of_the_prompts_is_decoded_at_full_depth(promise, tmp_path):
  model = Full(promise)
  options = arguments("--monitor", tmp_path / "m.jsonl", "--monitor_share=0.4")
  monitored = monitoring.open_monitored(options, model, 0.5)
  serve(monitored, TEXTS)
  coin = audit.open_monitor(tmp_path / "m.jsonl", monitored._monitor.watch).watch
  picked = [text for text in TEXTS if coin.sampled(f"id-{text}")]
  assert model.asked == picked and 5 < len(picked) < 30 and not monitored.alarm
  report = monitored.report()
  assert f"{len(picked)} of these prompts" in report and "No alarm." in report
  again = monitoring.open_monitored(options, model, 0.5)
  serve(again, TEXTS)
  report = again.report()
  assert "0 of these prompts" in report and f"{len(picked)} were not checked" in report
  serve(again, TEXTS, "new")
  assert f"{len(picked)} were not checked" in again.report()
  more = [text for text in TEXTS if coin.sampled(f"new-{text}")]
  assert f"{len(picked) + len(more)} of 120 so far" in again.report()


def test_a_monitor_runs_no_metric_that_only_the_file_names(promise, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "own_metric.py").write_text(
    "import pathlib\npathlib.Path('ran').touch()\nrun = lambda text, references: 0.0\n"
  )
  evil = types.SimpleNamespace(**{**vars(promise), "metric": "own_metric.py:run"})
  for asked, model in (
    (("--monitor", "m.jsonl"), Full(evil)),
    (("--allow_platform",), Full(evil, "`platform`: ...")),
  ):
    for given in ((), ("--metric=rouge_l",), ("--metric=chrf",)):
      with pytest.raises(ValueError, match=r"Expected `--metric` 'own_metric\.py:run'"):
        monitoring.open_monitored(arguments(*asked, *given), model, 0.5)
    assert not (tmp_path / "m.jsonl").exists()
    assert not (tmp_path / "ran").exists()
    given = arguments(*asked, "--monitor_share=1", "--metric=own_metric.py:run")
    monitored = monitoring.open_monitored(given, model, 0.5)
    serve(monitored, ["another"] * 40)
    assert monitored.alarm and (tmp_path / "ran").exists()
    del monitored
    for left in ("ran", "m.jsonl"):
      (tmp_path / left).unlink(missing_ok=True)
    monkeypatch.delitem(sys.modules, metrics._known(str(tmp_path / "own_metric.py")))
  with pytest.raises(ValueError, match=r"Expected `--metric` 'exact_match', .* got 'chrf'"):
    monitoring.open_monitored(arguments("--monitor=m", "--metric=chrf"), Full(promise), 0.5)
  with pytest.raises(ValueError, match="Expected `--monitor` beside `--metric`"):
    monitoring.open_monitored(arguments("--metric=chrf"), Full(promise), 0.5)


def test_texts_that_differ_raise_the_alarm(promise, tmp_path):
  options = arguments("--monitor", tmp_path / "m.jsonl", "--monitor_share=1")
  monitored = monitoring.open_monitored(options, Full(promise), 0.5)
  serve(monitored, ["another"] * 40)
  assert monitored.alarm and "ALARM: the expected loss" in monitored.report()
  assert "above 0.1" in monitored.report()


def test_a_killed_run_holds_nothing_up(promise, tmp_path):
  options = arguments("--monitor", tmp_path / "m.jsonl", "--monitor_share=1")
  monitored = monitoring.open_monitored(options, Full(promise), 0.5)
  monitored._monitor.serve("id-0")
  again = monitoring.open_monitored(options, Full(promise), 0.5)
  assert "1 of a run that was killed" in again.report()
  serve(again, TEXTS)
  assert again._monitor.wealth.count == 41


def test_a_promise_from_another_platform_is_watched_unasked(promise):
  where = "`platform`: expected 'tpu', got 'cpu'"
  model = Full(promise, where)
  monitored = monitoring.open_monitored(arguments("--allow_platform"), model, 0.5)
  assert monitored.report().count("None of these prompts was checked") == 1
  serve(monitored, TEXTS)
  assert 2 < len(model.asked) < 20
  report = monitored.report()
  assert f"made elsewhere: {where}. What was checked" in report and "No alarm." in report
  options = arguments("--allow_platform", "--monitor_share=1")
  monitored = monitoring.open_monitored(options, Full(promise, where), 0.5)
  serve(monitored, ["another"] * 40)
  assert monitored.alarm and "ALARM" in monitored.report()
  kept = monitored._monitor.path
  assert kept.exists()
  del monitored
  assert not kept.parent.exists()
  never = calibrate.NEVER_EXIT
  assert monitoring.open_monitored(arguments(), Full(promise, where), never) is None


def test_what_texts_cannot_show_is_refused(promise, tmp_path):
  options = arguments("--monitor", tmp_path / "m.jsonl")
  other = lambda **fields: Full(types.SimpleNamespace(**{**vars(promise), **fields}))
  for model, threshold in (
    (Full(None), 0.5),
    (Full(promise), 0.4),
    (other(threshold=calibrate.NEVER_EXIT), calibrate.NEVER_EXIT),
  ):
    with pytest.raises(
      ValueError, match="`--monitor` with a calibration and its own threshold"
    ):
      monitoring.open_monitored(options, model, threshold)
  for model in (other(kind="risk_signed"), other(clusters=True)):
    with pytest.raises(ValueError, match="textual loss of single prompts"):
      monitoring.open_monitored(options, model, 0.5)
  with pytest.raises(ValueError, match="Expected `--monitor` beside `--fail_on_alarm`"):
    monitoring.open_monitored(arguments("--fail_on_alarm"), Full(promise), 0.5)
  assert monitoring.open_monitored(arguments(), Full(promise), 0.5) is None
  with pytest.raises(ValueError, match="`sampling_rate` to be in"):
    shares = arguments("--monitor", tmp_path / "m.jsonl", "--monitor_share=0")
    monitoring.open_monitored(shares, Full(promise), 0.5)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
def test_a_watch_of_the_mean_loss_is_kept_from_other_promises(made, tmp_path):
  assert {promise.name for promise in MADE} == set(promises.PROMISES)
  calibrate.calibrate(LOSSES, tolerance=0.3, error_rate=0.05, promise=made).save(
    tmp_path / "calibration.json"
  )
  told = calibrate.Calibration.load(tmp_path / "calibration.json")
  assert told.threshold == 0.5
  asked = arguments("--monitor", tmp_path / "m.jsonl", "--monitor_share=1"), Full(told)
  on_trial = arguments("--allow_platform", "--monitor_share=1"), Full(told, "`platform`: ...")
  for options, model in (asked, on_trial):
    if made.name in ("mean", "cost"):
      monitored = monitoring.open_monitored(options, model, 0.5)
      serve(monitored, TEXTS)
      assert "No alarm." in monitored.report()
      serve(monitored, ["another"] * 40, "new")
      assert "ALARM" in monitored.report() and "above 0.3" in monitored.report()
      continue
    with pytest.raises(ValueError, match=f"'mean' or 'cost'.*got '{made.name}'.*; .*audit"):
      monitoring.open_monitored(options, model, 0.5)
    assert not model.asked and not (tmp_path / "m.jsonl").exists()
