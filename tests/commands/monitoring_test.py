"""`calm infer --monitor` without a model: what is checked, what is said, what is refused."""

import argparse
import sys
import types

import pytest

from calm import calibrate
from calm.calibrate import metrics, monitor, risks
from calm.commands import infer

TEXTS = [f"text {i}" for i in range(40)]
LOSSES = calibrate.SequenceLosses([[0.0]] * 200, [0.5], metric="exact_match")
RISKS = (risks.Risk(LOSSES, 0.3),)
WHERE = "`platform`: expected 'tpu', got 'cpu'"
# Every promise, as `calibrate` takes it; the mean loss of some is watched.
MADE = (
  risks.Mean(),
  risks.Quantile(0.9),
  risks.EveryGroup(labels=["a", "b"] * 100),
  risks.EarlyExits((3.0,), depths=[[1.0]] * 200),
  risks.TailMean(0.9, 0.05),
  risks.KnownMixture(2.0, weights=[1.0] * 200),
  risks.SeveralRisks(risks=RISKS),
  risks.Cost(0.5, 0.3, costs=[[0.1]] * 200),
  risks.Configurations(risks=RISKS, configurations=("a",), costs=(1.0,)),
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


def opened(model, *options, threshold=0.5):
  parser = argparse.ArgumentParser()
  infer.add_arguments(parser)
  arguments = parser.parse_args(["--prompts=-", *map(str, options)])
  return infer.open_monitored(arguments, model, threshold)


def serve(monitored, texts, ids="id"):
  prompts = [calibrate.Prompt(f"{ids}-{text}", text) for text in TEXTS]
  monitored.check(prompts, [types.SimpleNamespace(text=text) for text in texts])


def test_a_share_of_the_prompts_is_decoded_at_full_depth(promise, tmp_path):
  model, options = Full(promise), (f"--monitor={tmp_path / 'm.jsonl'}", "--monitor_share=0.4")
  monitored = opened(model, *options)
  serve(monitored, TEXTS)
  coin = monitor.open_monitor(tmp_path / "m.jsonl", monitored.monitor.watch).watch
  picked = [text for text in TEXTS if coin.sampled(f"id-{text}")]
  assert model.asked == picked and 5 < len(picked) < 30
  report = monitored.report()
  assert f"{len(picked)} of these prompts" in report and "No alarm." in report
  again = opened(model, *options)
  serve(again, TEXTS)
  assert "0 of these prompts" in again.report()
  serve(again, TEXTS, "new")
  more = [text for text in TEXTS if coin.sampled(f"new-{text}")]
  assert f"{len(picked)} were not checked" in again.report()
  assert f"{len(picked) + len(more)} of 120 so far" in again.report()


def test_a_monitor_runs_no_metric_that_only_the_file_names(promise, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "own_metric.py").write_text(
    "import pathlib\npathlib.Path('ran').touch()\nrun = lambda text, references: 0.0\n"
  )
  evil = types.SimpleNamespace(**{**vars(promise), "metric": "own_metric.py:run"})
  for option, model in (
    ("--monitor=m.jsonl", Full(evil)),
    ("--allow_platform", Full(evil, WHERE)),
  ):
    for given in ((), ("--metric=rouge_l",), ("--metric=chrf",)):
      with pytest.raises(ValueError, match=r"Expected `--metric` 'own_metric\.py:run'"):
        opened(model, option, *given)
    assert not (tmp_path / "m.jsonl").exists() and not (tmp_path / "ran").exists()
    monitored = opened(model, option, "--monitor_share=1", "--metric=own_metric.py:run")
    serve(monitored, ["another"] * 40)
    assert monitored.monitor.alarm and (tmp_path / "ran").exists()
    del monitored
    for left in ("ran", "m.jsonl"):
      (tmp_path / left).unlink(missing_ok=True)
    monkeypatch.delitem(sys.modules, metrics._known(str(tmp_path / "own_metric.py")))
  with pytest.raises(ValueError, match=r"Expected `--metric` 'exact_match', .* got 'chrf'"):
    opened(Full(promise), "--monitor=m", "--metric=chrf")


def test_a_killed_run_holds_nothing_up(promise, tmp_path):
  options = f"--monitor={tmp_path / 'm.jsonl'}", "--monitor_share=1"
  monitored = opened(Full(promise), *options)
  monitored.monitor.serve("id-0")
  again = opened(Full(promise), *options)
  assert "1 of a run that was killed" in again.report()
  serve(again, TEXTS)
  assert again.monitor.wealth.count == 41


def test_a_promise_from_another_platform_is_watched_unasked(promise):
  model = Full(promise, WHERE)
  monitored = opened(model, "--allow_platform")
  assert "None of these prompts was checked" in monitored.report()
  serve(monitored, TEXTS)
  assert 2 < len(model.asked) < 20
  report = monitored.report()
  assert f"made elsewhere: {WHERE}. What was checked" in report and "No alarm." in report
  monitored = opened(model, "--allow_platform", "--monitor_share=1")
  serve(monitored, ["another"] * 40)
  assert monitored.monitor.alarm and "ALARM" in monitored.report()
  kept = monitored.monitor.path
  assert kept.exists()
  del monitored
  assert not kept.parent.exists()
  assert opened(model, threshold=calibrate.NEVER_EXIT) is None


def test_what_texts_cannot_show_is_refused(promise, tmp_path):
  monitor = f"--monitor={tmp_path / 'm.jsonl'}"
  other = lambda **fields: Full(types.SimpleNamespace(**{**vars(promise), **fields}))
  never = calibrate.NEVER_EXIT
  for model, threshold in (
    (Full(None), 0.5),
    (Full(promise), 0.4),
    (other(threshold=never), never),
  ):
    with pytest.raises(ValueError, match="`--monitor` needs a calibration that certified"):
      opened(model, monitor, threshold=threshold)
  for model in (other(kind="risk_signed"), other(clusters=True)):
    with pytest.raises(ValueError, match="textual loss of single prompts"):
      opened(model, monitor)
  for option in ("--fail_on_alarm", "--metric=chrf"):
    with pytest.raises(ValueError, match=f"`{option.partition('=')[0]}` needs `--monitor`"):
      opened(Full(promise), option)
  assert opened(Full(promise)) is None
  with pytest.raises(ValueError, match="`sampling_rate` to be in"):
    opened(Full(promise), monitor, "--monitor_share=0")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
def test_a_watch_of_the_mean_loss_is_kept_from_other_promises(made, tmp_path):
  assert {promise.name for promise in MADE} == set(risks.PROMISES)
  path, monitor = tmp_path / "calibration.json", f"--monitor={tmp_path / 'm.jsonl'}"
  calibrate.calibrate(LOSSES, tolerance=0.3, error_rate=0.05, promise=made).save(path)
  stored = calibrate.Calibration.load(path)
  assert stored.threshold == 0.5
  for option, model in ((monitor, Full(stored)), ("--allow_platform", Full(stored, WHERE))):
    if made.name in ("mean", "cost"):
      monitored = opened(model, option, "--monitor_share=1")
      serve(monitored, TEXTS)
      assert "No alarm." in monitored.report()
      serve(monitored, ["another"] * 40, "new")
      assert "ALARM" in monitored.report() and "above 0.3" in monitored.report()
      continue
    with pytest.raises(ValueError, match=f"'mean' or 'cost'.*got '{made.name}'; .*monitor"):
      opened(model, option, "--monitor_share=1")
    assert not model.asked and not (tmp_path / "m.jsonl").exists()
