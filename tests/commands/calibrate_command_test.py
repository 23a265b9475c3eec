"""`calm calibrate` on JSON Lines files alone: groups, promises, tampered files."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  calibration,
  generations,
  ledger,
  risks,
)
from calm.calibrate import calibrate as certify
from calm.calibrate.generations import foreign
from calm.calibrate.losses import compute
from calm.commands import calibrate

RISKS = ("--risks", "textual:rouge_l:0.2", "risk_signed:token_f1:0.2")


def write(folder, rows, name):
  path = folder / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def outputs(folder, count=80, groups=None, wrong=()):
  """Options of the full model and of one threshold whose texts differ in the rows `wrong`."""
  full, early = [], []
  for row in range(count):
    prompt = {"id": f"p{row}", "input": f"prompt {row}", "targets": ["a b c"]}
    if groups is not None and groups[row] is not None:
      prompt["group"] = groups[row]
    full.append({**prompt, "prediction": "a b c"})
    early.append({"id": f"p{row}", "prediction": "x" if row in wrong else "a b c"})
  files = write(folder, full, "full.jsonl"), write(folder, early, "early.jsonl")
  named = [f"--full={files[0]}", "--outputs", f"0.5={files[1]}"]
  return ["calibrate", *named, f"--output={folder / 'calibration.json'}"]


def test_groups_count_wherever_they_are_known(tmp_path, calm):
  groups = [*(f"g{row // 4}" for row in range(79)), None]  # one without is its own
  words, saved = outputs(tmp_path, groups=groups), tmp_path / "calibration.json"
  assert "at least 22 clusters of prompts" in calm(*words, code=2)
  for flags in (["--tolerance=0.2"], RISKS):
    assert "80 prompts come in 21 clusters" in calm(*words, *flags)
    found = Calibration.load(saved)
    assert found.clusters and found.num_examples == 21
    assert "independent draw all the same" in calm(*words, *flags, "--ungrouped")
    found = Calibration.load(saved)
    assert found.num_examples == 80 and not found.clusters and found.groups_ignored
    assert "the caller took each for an independent draw" in found.guarantee
  printed = calm(*outputs(tmp_path))  # outputs of elsewhere end with no command
  assert "prompts come in" not in printed and "Serve it" not in printed
  assert "groups_ignored" not in saved.read_text()


PLANTED = """
import pathlib

pathlib.Path("ran").touch()

def run(prediction, references):
  return 1.0
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
  """Two modules in the working directory that leave the file `ran` there when they run."""
  monkeypatch.chdir(tmp_path)
  for name in ("planted_one", "planted_two"):
    (tmp_path / f"{name}.py").write_text(PLANTED)
    monkeypatch.delitem(sys.modules, name, raising=False)
  return tmp_path


@pytest.mark.parametrize(
  "named", ["planted_one:run", "planted_one.py:run", "shutil:rmtree", "unknown", "os:system"]
)
def test_verify_runs_no_metric_that_only_the_file_names(named, planted, calm):
  words = outputs(planted, wrong=(3, 7))
  saved, kept = planted / "calibration.json", planted / "kept"
  kept.mkdir()
  calm(*words, "--tolerance=0.3")
  dataclasses.replace(Calibration.load(saved), metric=named).save(saved)
  write(planted, [{"id": f"p{n}", "prediction": str(kept)} for n in range(80)], "early.jsonl")
  for given in ((), ("--metric=rouge_l",), ("--metric=planted_two.py:run",)):
    (planted / "ran").unlink(missing_ok=True)
    error = calm(*words, f"--verify={saved}", *given, code=2)
    assert f"Expected `--metric` {named!r}" in error
    assert not (planted / "ran").exists() or given == ("--metric=planted_two.py:run",)
    assert "planted_one" not in sys.modules and kept.is_dir()


def test_verify_takes_a_metric_that_is_given_again(planted, calm):
  words = outputs(planted, wrong=(3, 7))
  verify = f"--verify={planted / 'calibration.json'}"
  (planted / "wrapped.py").write_text(
    "from calm.calibrate import metrics\n"
    "plain = lambda text, references: 0.5\n"
    "named = metrics.Metric('half', plain)\n"
  )
  for given in ("planted_one.py:run", "wrapped.py:plain", "wrapped.py:named"):
    made = [*words, "--tolerance=0.9", f"--metric={given}"]
    calm(*made)
    calm(*made, verify)
    for other in ((), ("--metric=chrf",)):
      assert "Expected `--metric` " in calm(*words, verify, *other, code=2)
  calm(*words, "--metric=token_f1", "--tolerance=0.9")
  calm(*words, verify)
  assert "Expected `--metric` 'token_f1'" in calm(*words, verify, "--metric=chrf", code=2)


def test_promises_are_named_by_flags(tmp_path, calm, monkeypatch):
  words = outputs(tmp_path, count=120, wrong=range(0, 120, 20))
  words += ["--metric=token_f1", "--tolerance=0.2"]
  saved = tmp_path / "calibration.json"
  printed = calm(*words, "--promise=quantile", "--share=0.85")
  assert "for at least 85 % of texts" in printed
  found = Calibration.load(saved)
  assert found.certified and found.promise == risks.Quantile(0.85)
  rows = [{"id": f"p{row}", "label": "xy"[row % 2]} for row in range(120)]
  calm(*words, "--promise=every_group", f"--labels={write(tmp_path, rows, 'labels.jsonl')}")
  assert Calibration.load(saved).promise.groups == ("x", "y")
  calm(*words, "--promise=tail_mean", "--beta=0.5", "--start=0.01")
  assert Calibration.load(saved).promise.name == "tail_mean"
  few = write(tmp_path, rows[1:], "few.jsonl")
  monkeypatch.setattr(calibrate, "_losses", None)  # refused before any text is compared
  for flags, message in (
    (["--promise=every_group"], "needs `--labels`"),
    (["--promise=every_group", f"--labels={few}"], "got none for 1, first ['p0']"),
    (["--promise=cost"], "outputs with `exit_layers`"),
    (["--promise=early_exits"], "needs `--depths`"),
    (["--promise=early_exits", "--depths=3"], "outputs with `exit_layers`"),
    (["--promise=quantile", "--share=2"], "`share`"),
  ):
    assert message in calm(*words, *flags, code=2)


def test_a_calibration_is_verified_from_its_outputs(tmp_path, calm):
  words = outputs(tmp_path, count=120, wrong=(3, 50), groups=[f"g{n // 2}" for n in range(120)])
  saved = tmp_path / "calibration.json"
  verify = [*words, f"--verify={saved}"]
  for flags in ([], ["--promise=quantile", "--share=0.8"], ["--method=paper"], ["--ungrouped"]):
    calm(*words, *flags)
    before = saved.read_bytes()
    assert Calibration.load(saved).digest in calm(*verify).replace(" ", "")
    assert saved.read_bytes() == before
  # Prompts that were taken for independent without a word.
  dataclasses.replace(Calibration.load(saved), groups_ignored=False).save(saved)
  assert "groups_ignored" in calm(*verify, code=2)
  calm(*words)
  value = json.loads(saved.read_text())
  value["guarantee"] = value["guarantee"].replace("0.95", "0.99")
  saved.write_text(json.dumps({**value, "digest": calibration.digest(value)}))
  assert "to be the sentence of its numbers" in calm(*verify, code=2)
  calm(*words)
  outputs(tmp_path, count=120, wrong=(3, 51), groups=[f"g{n // 2}" for n in range(120)])
  assert "losses_digest" in calm(*verify, code=2)


def test_knobs_are_thresholds_throughout_or_not_at_all():
  assert calibrate._parse_knobs(["0.9", "0.5"]) == [0.9, 0.5]
  assert calibrate._parse_knobs(["base", "tiny"]) == ["base", "tiny"]
  with pytest.raises(ValueError, match=r"another knob throughout, got both: \['0.9', '12'\]"):
    calibrate._parse_knobs(["0.9", "12"])


def test_references_are_wanted_only_where_texts_differ(tmp_path, calm):
  words = outputs(tmp_path, wrong=(3, 50))
  words += ["--kind=risk_clipped", "--metric=token_f1"]
  full, saved = tmp_path / "full.jsonl", tmp_path / "calibration.json"
  rows = [json.loads(line) for line in full.read_text().splitlines()]
  write(tmp_path, [{**row, "targets": []} for row in rows], "full.jsonl")
  assert "got 2 that have none, first ['p3', 'p50']" in calm(*words, code=2)
  asked = [{"id": name, "targets": ["a b c"]} for name in ("p3", "p50")]
  answers = write(tmp_path, asked, "answers.jsonl")
  calm(*words, f"--references={answers}")
  some = Calibration.load(saved)
  write(tmp_path, rows, "full.jsonl")
  calm(*words)
  assert Calibration.load(saved) == some  # as if all had been labelled
  stray = write(tmp_path, [{"id": "nobody", "targets": ["x"]}], "stray.jsonl")
  assert "got 1 others" in calm(*words, f"--references={stray}", code=2)


def grid(folder, rates, layers, measure="softmax", count=400, seed=0, size=None):
  """A folder as of `calm generate`: at each threshold some texts differ, all of one depth."""
  from calm.calibrate import Prompt, Record, open_writer
  from tests.calibrate import laws

  generator = np.random.default_rng(seed)
  group = lambda row: size and f"article {row // size}"
  prompts = [Prompt(f"p{row}", f"prompt {row}", ("a b c",), group(row)) for row in range(count)]
  procedure = dataclasses.replace(laws.procedure(), measure=measure)
  levels = [0.9, 0.5][: len(rates)]
  writer = open_writer(folder, prompts=prompts, thresholds=levels, procedure=procedure)
  ways = zip([float("inf"), *levels], [0.0, *rates], [8, *layers], strict=True)
  for threshold, rate, depth in ways:
    texts = ["x" if bad else "a b c" for bad in generator.random(count) < rate]
    numbers = {"exit_layers": (depth,), "tokens": (3,)}
    pairs = zip(prompts, texts, strict=True)
    writer.append(threshold, [Record(p.id, text, **numbers) for p, text in pairs])
  writer.finish()
  return folder


@pytest.mark.parametrize("metric", ["exact_match", "token_f1"])
@pytest.mark.parametrize("share", [None, 0.2])
def test_a_promise_of_cost_is_verified(metric, share, tmp_path, calm):
  folder, saved = grid(tmp_path / "cache", [0.01, 0.3], [4, 2]), tmp_path / "calibration.json"
  if share is None:  # as the command makes it, of whatever method fits each part
    calm("calibrate", folder, "--promise=cost", f"--metric={metric}", f"--output={saved}")
  else:
    losses = compute(generations.load(folder), "textual", metric=metric)
    promise = risks.Cost(0.6, share, costs=[[4 / 8, 2 / 8]] * 400)
    made = certify(losses, tolerance=0.1, error_rate=0.05, promise=promise)
    assert made.parts[0].method != made.parts[1].method or metric == "token_f1"
    made.save(saved)
  found = Calibration.load(saved)
  assert found.threshold == 0.9
  assert found.digest in calm("calibrate", folder, f"--verify={saved}").replace(" ", "")
  first, cost = found.parts
  bounds = tuple(bound + 0.01 for bound in cost.upper_bounds)
  edited = first, dataclasses.replace(cost, upper_bounds=bounds)
  dataclasses.replace(found, parts=edited).save(saved)  # with the digest that fits
  assert "['parts']" in calm("calibrate", folder, f"--verify={saved}", code=2)


def test_several_risks_are_named_by_flags(tmp_path, calm):
  folder = grid(tmp_path / "cache", [0.01, 0.3], [6, 2])
  risks = ["--risks", "textual:rouge_l:0.1", "risk_clipped:token_f1:0.05"]
  printed = calm("calibrate", folder, *risks)
  assert "textual loss (rouge_l) of at most 0.1 and risk_clipped loss (token_f1) of" in printed
  found = Calibration.load(folder / "calibration.json")
  assert found.promise.name == "several_risks" and found.promise.tolerances == (0.1, 0.05)
  assert found.threshold == 0.9
  verify = f"--verify={folder / 'calibration.json'}"
  assert "got 'several_risks'; make it again" in calm("calibrate", folder, verify, code=2)
  for odd in ("textual:rouge_l", "textual:rouge_l:2", "textual::0.1", "other:rouge_l:0.1"):
    assert "Expected" in calm("calibrate", folder, "--risks", odd, code=2)
  with pytest.raises(SystemExit, match="2"):
    calm("calibrate", folder, *risks, "--promise=quantile")


def test_the_cheapest_of_several_folders(tmp_path, calm):
  one = grid(tmp_path / "softmax", [0.01, 0.3], [6, 2])
  two = grid(tmp_path / "state", [0.02], [4], measure="state", seed=1)
  output = tmp_path / "chosen.json"
  pairs = ["--configurations", f"softmax={one}", f"state={two}"]
  risks = ["--risks", "textual:rouge_l:0.1", "risk_signed:token_f1:0.1"]
  printed = calm("calibrate", *pairs, *risks, f"--output={output}")
  assert "Calibrated configuration: state at 0.9 (state at 0.9 is the cheapest (4)" in printed
  found = Calibration.load(output)
  assert found.threshold == 0.9 and found.procedure.measure == "state"
  assert found.promise.name == "configurations" and found.num_examples == 400
  # Without --risks: the one of --kind, --metric and --tolerance.
  printed = calm("calibrate", *pairs, f"--output={output}", "--tolerance=0.001")
  assert "Calibrated configuration: never" in printed
  for odd, message in (
    ([*pairs], "`--configurations` needs `--output`"),
    ([one, *pairs, f"--output={output}"], "`--configurations` needs `--output`"),
    ([*pairs, f"--output={output}", "--verify=x"], "`--configurations` needs `--output`"),
    (["--configurations", one, f"--output={output}"], "NAME=DIR"),
  ):
    assert message in calm("calibrate", *odd, code=2)


def test_configurations_count_groups_too(tmp_path, calm):
  output = tmp_path / "chosen.json"
  pairs = [f"{way}={grid(tmp_path / way, [0.01], [4], way, size=4)}" for way in ("a", "b")]
  for flags, clusters, count in (((), True, 100), (("--ungrouped",), False, 400)):
    calm("calibrate", "--configurations", *pairs, f"--output={output}", *flags)
    found = Calibration.load(output)
    assert (found.clusters, found.num_examples) == (clusters, count)
    assert found.groups_ignored != clusters


def test_equal_calls_answer_equally_and_a_drawn_order_is_verified_by_its_seed(tmp_path, calm):
  words = outputs(tmp_path, count=200, wrong=(3, 7))
  rates = ["--method=betting", "--tolerance=0.3", "--metric=exact_match"]
  full, path = tmp_path / "full.jsonl", tmp_path / "calibration.json"
  rows = [json.loads(line) for line in full.read_text().splitlines()]
  write(tmp_path, [{**row, "input": ""} for row in rows], "full.jsonl")
  found = []
  for _ in range(2):
    calm(*words, *rates)
    found.append(path.read_bytes())
  assert found[0] == found[1]
  printed = calm(*words, f"--verify={path}")
  assert "is what these outputs give" in printed and "earlier versions" not in printed
  gathered = foreign.gather(full, {0.5: tmp_path / "early.jsonl"})
  losses = compute(gathered, "textual", metric="exact_match")
  # As earlier versions drew the order of such outputs.
  certify(losses, tolerance=0.3, error_rate=0.05, method="betting", seed="ab").save(path)
  printed = calm(*words, f"--verify={path}")
  assert "is what these outputs give" in printed and "earlier versions drew" in printed


def test_a_ledger_is_kept_and_says_so(tmp_path, calm):
  (tmp_path := tmp_path / "runs").mkdir()  # no folder beside it whose ledger would be read
  words = outputs(tmp_path, count=200, wrong=(3, 7))
  assert "calibrated on before" not in calm(*words)
  printed = calm(*words, "--metric=exact_match")
  assert "textual, rouge_l" in printed and "--error_rate=0.025" in printed
  calm(*words, f"--verify={tmp_path / 'calibration.json'}")
  kept = [json.loads(line) for line in (tmp_path / ledger.LEDGER).read_text().splitlines()]
  assert [line["question"]["metric"] for line in kept] == ["rouge_l", "exact_match"]
  assert "each of the 3 again with --error_rate=0.01667" in calm(*words, *RISKS)
  (tmp_path / ledger.LEDGER).write_text("damaged\n")
  assert "could not be recorded" in calm(*words)
