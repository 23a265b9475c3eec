"""`calm calibrate` on JSON Lines files alone: groups, promises, tampered files."""

import argparse
import dataclasses
import json
import sys

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  generations,
  ledger,
  promises,
  textual_losses,
  verification,
)
from calm.calibrate import calibrate as certify
from calm.calibrate.generations import foreign
from calm.commands import calibrate, cli, infer


def write(folder, rows, name):
  path = folder / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def outputs(folder, count=80, groups=None, wrong=()):
  """Files of the full model and of one threshold whose texts differ in the rows `wrong`."""
  full, early = [], []
  for row in range(count):
    prompt = {"id": f"p{row}", "input": f"prompt {row}", "targets": ["a b c"]}
    if groups is not None and groups[row] is not None:
      prompt["group"] = groups[row]
    full.append({**prompt, "prediction": "a b c"})
    early.append({"id": f"p{row}", "prediction": "x" if row in wrong else "a b c"})
  return [
    f"--full={write(folder, full, 'full.jsonl')}",
    "--outputs",
    f"0.5={write(folder, early, 'early.jsonl')}",
    f"--output={folder / 'calibration.json'}",
  ]


def test_groups_count_wherever_they_are_known(tmp_path, capsys):
  groups = [*(f"g{row // 4}" for row in range(79)), None]  # one without is its own
  files, saved = outputs(tmp_path, groups=groups), tmp_path / "calibration.json"
  assert cli.main(["calibrate", *files]) == 2
  assert "at least 29 clusters of prompts" in capsys.readouterr().err
  several = ["--risks", "textual:rouge_l:0.2", "risk_signed:token_f1:0.2"]
  for flags in (["--tolerance=0.2"], several):
    assert cli.main(["calibrate", *files, *flags]) == 0
    assert "80 prompts come in 21 clusters" in " ".join(capsys.readouterr().out.split())
    found = Calibration.load(saved)
    assert found.clusters and found.num_examples == 21
    assert cli.main(["calibrate", *files, *flags, "--ungrouped"]) == 0
    assert "independent draw all the same" in " ".join(capsys.readouterr().out.split())
    found = Calibration.load(saved)
    assert found.num_examples == 80 and not found.clusters and found.groups_ignored
    assert "the caller took each for an independent draw" in found.guarantee
  assert cli.main(["calibrate", *outputs(tmp_path)]) == 0
  assert "prompts come in" not in capsys.readouterr().out
  found = Calibration.load(saved)
  assert not found.groups_ignored and "groups_ignored" not in saved.read_text()


def test_a_calibration_without_groups_is_verified_without_them(tmp_path, capsys):
  files = outputs(tmp_path, groups=[f"g{row // 2}" for row in range(80)])
  for flags in ([], ["--ungrouped"]):
    assert cli.main(["calibrate", *files, *flags]) == 0
    assert cli.main(["calibrate", *files, f"--verify={tmp_path / 'calibration.json'}"]) == 0
  # A file that takes prompts for independent without a word is not what the outputs give.
  silent = dataclasses.replace(
    Calibration.load(tmp_path / "calibration.json"), groups_ignored=False
  )
  silent.save(tmp_path / "silent.json")
  assert cli.main(["calibrate", *files, f"--verify={tmp_path / 'silent.json'}"]) == 2
  assert "groups_ignored" in capsys.readouterr().err


def false_certifications(folder, *flags):
  """How many of 60 draws certify: 30 clusters of 10 prompts, 10.2 % bad at tolerance 10 %.

  Clusters are told by `group` in every second draw, by equal inputs in the others.
  """
  generator = np.random.default_rng(0)
  wrong = 0
  for draw in range(60):
    bad, full, early = generator.random(30) < 0.102, [], []
    for row in range(300):
      cluster = row // 10
      by_group = {"input": f"question {row}", "group": f"article {cluster}"}
      by_text = {"input": f"Ｑuestion\u00a0{cluster}" if row % 2 else f" question  {cluster}\n"}
      full.append({"id": f"p{row}", "prediction": "a", **(by_text if draw % 2 else by_group)})
      early.append({"id": f"p{row}", "prediction": "x" if bad[cluster] else "a"})
    files = {name: write(folder, rows, name) for name, rows in (("f", full), ("e", early))}
    output = folder / "calibration.json"
    arguments = [f"--full={files['f']}", "--outputs", f"0.5={files['e']}", f"--output={output}"]
    assert cli.main(["calibrate", *arguments, "--metric=exact_match", *flags]) == 0
    wrong += Calibration.load(output).certified
  return wrong


def test_files_with_clusters_certify_falsely_no_more_often_than_promised(tmp_path):
  """At 5 %, 9 or more of 60 have probability 0.003."""
  assert false_certifications(tmp_path) <= 8


def test_prompts_of_clusters_taken_for_independent_certify_falsely(tmp_path):
  """Meta: the files of the test above can certify falsely."""
  assert false_certifications(tmp_path, "--ungrouped") > 15


def test_the_same_files_give_the_same_calibration(tmp_path):
  arguments = outputs(tmp_path, wrong=(3, 7))
  for _ in range(2):
    assert cli.main(["calibrate", *arguments, "--metric=token_f1", "--tolerance=0.3"]) == 0
    found = (tmp_path / "calibration.json").read_text()
  assert cli.main(["calibrate", *arguments, "--metric=token_f1", "--tolerance=0.3"]) == 0
  assert (tmp_path / "calibration.json").read_text() == found


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
def test_verify_runs_no_metric_that_only_the_file_names(named, planted, capsys):
  files = outputs(planted, wrong=(3, 7))
  saved, kept = planted / "calibration.json", planted / "kept"
  kept.mkdir()
  assert cli.main(["calibrate", *files, "--tolerance=0.3"]) == 0
  told = Calibration.load(saved)
  dataclasses.replace(told, metric=named).save(saved)
  early = [{"id": f"p{row}", "prediction": str(kept)} for row in range(80)]
  write(planted, early, "early.jsonl")
  capsys.readouterr()
  for given in ((), ("--metric=rouge_l",), ("--metric=planted_two:run",)):
    (planted / "ran").unlink(missing_ok=True)
    assert cli.main(["calibrate", *files, f"--verify={saved}", *given]) == 2
    error = capsys.readouterr().err
    assert f"Expected `--metric` {named!r}" in error and "Traceback" not in error
    assert not (planted / "ran").exists() or given == ("--metric=planted_two:run",)
    assert "planted_one" not in sys.modules and kept.is_dir()


def test_verify_takes_a_metric_that_is_given_again(planted, capsys):
  files = outputs(planted, wrong=(3, 7))
  (planted / "wrapped.py").write_text(
    "from calm.calibrate.losses import metrics\n"
    "plain = lambda text, references: 0.5\n"
    "named = metrics.Metric('half', plain)\n"
  )
  for given in ("planted_one.py:run", "wrapped.py:plain", "wrapped.py:named"):
    made = ["calibrate", *files, "--tolerance=0.9", f"--metric={given}"]
    verify = f"--verify={planted / 'calibration.json'}"
    assert cli.main(made) == 0 and cli.main([*made, verify]) == 0
    assert cli.main(["calibrate", *files, verify]) == 2
    assert cli.main(["calibrate", *files, verify, "--metric=chrf"]) == 2
    assert capsys.readouterr().err.count("Expected `--metric` ") == 2
  assert cli.main(["calibrate", *files, "--metric=token_f1", "--tolerance=0.9"]) == 0
  assert cli.main(["calibrate", *files, verify]) == 0
  assert cli.main(["calibrate", *files, verify, "--metric=chrf"]) == 2
  assert "Expected `--metric` 'token_f1'" in capsys.readouterr().err


def test_promises_are_named_by_flags(tmp_path, capsys, monkeypatch):
  files = outputs(tmp_path, count=120, wrong=range(0, 120, 20))
  saved = tmp_path / "calibration.json"
  base = ["calibrate", *files, "--metric=token_f1", "--tolerance=0.2"]
  assert cli.main([*base, "--promise=quantile", "--share=0.85"]) == 0
  found = Calibration.load(saved)
  assert found.certified and found.promise == promises.Quantile(0.85)
  assert "for at least 85 % of texts" in " ".join(capsys.readouterr().out.split())
  rows = [{"id": f"p{row}", "label": "xy"[row % 2]} for row in range(120)]
  labels = write(tmp_path, rows, "labels.jsonl")
  assert cli.main([*base, "--promise=every_group", f"--labels={labels}"]) == 0
  assert Calibration.load(saved).promise.groups == ("x", "y")
  assert cli.main([*base, "--promise=tail_mean", "--beta=0.5", "--start=0.01"]) == 0
  assert Calibration.load(saved).promise.name == "tail_mean"
  capsys.readouterr()
  few = write(tmp_path, rows[1:], "few.jsonl")
  monkeypatch.setattr(calibrate, "_losses", None)  # refused before any text is compared
  for flags, words in (
    (["--promise=every_group"], "`--labels` for"),
    (["--promise=every_group", f"--labels={few}"], "got none for 1, first ['p0']"),
    (["--promise=cost"], "outputs with `exit_layers`"),
    (["--promise=early_exits"], "outputs with `exit_layers`"),
    (["--promise=quantile", "--share=2"], "`share`"),
  ):
    assert cli.main([*base, *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_calibration_is_verified_from_its_outputs(tmp_path, capsys):
  files = outputs(tmp_path, count=120, wrong=(3, 50))
  saved = tmp_path / "calibration.json"
  for flags in ([], ["--promise=quantile", "--share=0.8"], ["--method=paper"]):
    assert cli.main(["calibrate", *files, *flags]) == 0
    before = saved.read_bytes()
    assert cli.main(["calibrate", *files, f"--verify={saved}"]) == 0
    assert saved.read_bytes() == before
    assert Calibration.load(saved).digest in "".join(capsys.readouterr().out.split())
  other = tmp_path / "other"
  other.mkdir()
  changed = outputs(other, count=120, wrong=(3, 51))
  assert cli.main(["calibrate", *changed, f"--verify={saved}"]) == 2
  assert "losses_digest" in capsys.readouterr().err


def test_references_are_wanted_only_where_texts_differ(tmp_path, capsys):
  arguments = outputs(tmp_path, count=80, wrong=(3, 50))
  full = tmp_path / "full.jsonl"
  rows = [json.loads(line) for line in full.read_text().splitlines()]
  write(tmp_path, [{**row, "targets": []} for row in rows], "full.jsonl")
  risk = ["calibrate", *arguments, "--kind=risk_clipped", "--metric=token_f1"]
  assert cli.main(risk) == 2
  assert "got 2 that have none, first ['p3', 'p50']" in capsys.readouterr().err
  wanted = tmp_path / "wanted.jsonl"
  assert cli.main([*risk, f"--list_unlabelled={wanted}"]) == 0
  asked = [json.loads(line) for line in wanted.read_text().splitlines()]
  assert [(row["id"], row["full"], row["early"]) for row in asked] == [
    ("p3", "a b c", ["x"]),
    ("p50", "a b c", ["x"]),
  ]
  told = write(tmp_path, [{**row, "targets": ["a b c"]} for row in asked], "told.jsonl")
  assert cli.main([*risk, f"--references={told}"]) == 0
  some = Calibration.load(tmp_path / "calibration.json")
  write(tmp_path, rows, "full.jsonl")
  assert cli.main(risk) == 0
  assert Calibration.load(tmp_path / "calibration.json") == some  # as if all had been labelled
  stray = write(tmp_path, [{"id": "nobody", "targets": ["x"]}], "stray.jsonl")
  assert cli.main([*risk, f"--references={stray}"]) == 2


def test_infer_can_expect_a_digest(tmp_path):
  assert cli.main(["calibrate", *outputs(tmp_path)]) == 0
  path = str(tmp_path / "calibration.json")
  digest = Calibration.load(path).digest
  given = argparse.Namespace(calibration=path, expect_digest=digest)
  assert infer._calibration(given) == Calibration.load(path)
  assert infer._calibration(argparse.Namespace(calibration=path, expect_digest=None)) == path
  for calibration, expected, words in (
    (path, "0" * 64, "another one"),
    (None, digest, "beside"),
  ):
    with pytest.raises(ValueError, match=words):
      infer._calibration(argparse.Namespace(calibration=calibration, expect_digest=expected))


def grid(folder, rates, layers, measure="softmax", count=400, seed=0, size=None):
  """A folder as of `calm generate`: at each threshold some texts differ, all of one depth."""
  from calm.calibrate import Prompt, Record, open_writer
  from tests.calibrate import laws

  generator = np.random.default_rng(seed)
  group = lambda row: size and f"article {row // size}"
  prompts = [Prompt(f"p{row}", f"prompt {row}", ("a b c",), group(row)) for row in range(count)]
  procedure = dataclasses.replace(laws.procedure(), measure=measure)
  grid = [0.9, 0.5][: len(rates)]
  writer = open_writer(folder, prompts=prompts, thresholds=grid, procedure=procedure)
  for threshold, rate, depth in zip(
    [float("inf"), *grid], [0.0, *rates], [8, *layers], strict=True
  ):
    wrong = generator.random(count) < rate
    writer.append(
      threshold,
      [
        Record(p.id, "x" if bad else "a b c", exit_layers=(depth,), tokens=(3,))
        for p, bad in zip(prompts, wrong, strict=True)
      ],
    )
  writer.finish()
  return folder


@pytest.mark.parametrize("metric", ["exact_match", "token_f1"])
@pytest.mark.parametrize("share", [None, 0.5, 0.2])
def test_a_promise_of_cost_is_verified(metric, share, tmp_path, capsys):
  folder, saved = grid(tmp_path / "cache", [0.01, 0.3], [4, 2]), tmp_path / "calibration.json"
  if share is None:  # as the command makes it, of whatever method fits each part
    flags = ["--promise=cost", f"--metric={metric}", f"--output={saved}"]
    assert cli.main(["calibrate", str(folder), *flags]) == 0
  else:
    losses = textual_losses(generations.load(folder), metric=metric)
    promise = promises.Cost(0.6, share, costs=[[4 / 8, 2 / 8]] * 400)
    made = certify(losses, tolerance=0.1, error_rate=0.05, promise=promise)
    assert made.parts[0].method != made.parts[1].method or metric == "token_f1"
    made.save(saved)
  found = Calibration.load(saved)
  assert found.threshold == 0.9
  assert cli.main(["calibrate", str(folder), f"--verify={saved}"]) == 0
  assert found.digest in "".join(capsys.readouterr().out.split())
  first, cost = found.parts
  bounds = tuple(bound + 0.01 for bound in cost.upper_bounds)
  edited = first, dataclasses.replace(cost, upper_bounds=bounds)
  dataclasses.replace(found, parts=edited).save(saved)  # with the digest that fits
  assert cli.main(["calibrate", str(folder), f"--verify={saved}"]) == 2
  assert "['parts']" in capsys.readouterr().err


def test_several_risks_are_named_by_flags(tmp_path, capsys):
  folder = grid(tmp_path / "cache", [0.01, 0.3], [6, 2])
  risks = ["--risks", "textual:rouge_l:0.1", "risk_clipped:token_f1:0.05"]
  assert cli.main(["calibrate", str(folder), *risks]) == 0
  found = Calibration.load(folder / "calibration.json")
  assert found.promise.name == "several_risks" and found.promise.tolerances == (0.1, 0.05)
  assert found.threshold == 0.9
  said = " ".join(capsys.readouterr().out.split())
  assert "textual loss (rouge_l) of at most 0.1 and risk_clipped loss (token_f1) of" in said
  assert cli.main(["calibrate", str(folder), f"--verify={folder / 'calibration.json'}"]) == 2
  assert "got 'several_risks'; make it again" in " ".join(capsys.readouterr().err.split())
  for odd in ("textual:rouge_l", "textual:rouge_l:2", "textual::0.1", "other:rouge_l:0.1"):
    assert cli.main(["calibrate", str(folder), "--risks", odd]) == 2
    assert "Expected" in capsys.readouterr().err
  assert cli.main(["calibrate", str(folder), *risks, "--promise=quantile"]) == 2
  assert "got --promise=quantile beside; leave" in capsys.readouterr().err


def test_the_cheapest_of_several_folders(tmp_path, capsys):
  one = grid(tmp_path / "softmax", [0.01, 0.3], [6, 2])
  two = grid(tmp_path / "state", [0.02], [4], measure="state", seed=1)
  output = tmp_path / "chosen.json"
  pairs = ["--configurations", f"softmax={one}", f"state={two}"]
  risks = ["--risks", "textual:rouge_l:0.1", "risk_signed:token_f1:0.1"]
  assert cli.main(["calibrate", *pairs, *risks, f"--output={output}"]) == 0
  found = Calibration.load(output)
  assert found.threshold == 0.9 and found.procedure.measure == "state"
  assert found.promise.name == "configurations" and found.num_examples == 200
  said = " ".join(capsys.readouterr().out.split())
  assert "Calibrated configuration: state at 0.9 (state at 0.9 is the cheapest (4)" in said
  # Without --risks: the one of --kind, --metric and --tolerance.
  assert cli.main(["calibrate", *pairs, f"--output={output}", "--tolerance=0.001"]) == 0
  assert not Calibration.load(output).certified
  assert "Calibrated configuration: never" in " ".join(capsys.readouterr().out.split())
  for odd, message in (
    ([*pairs], "with --output and without a folder"),
    ([str(one), *pairs, f"--output={output}"], "with --output and without a folder"),
    (["--configurations", str(one), f"--output={output}"], "NAME=DIR"),
    ([*pairs, f"--output={output}", "--verify=x"], "got --verify beside"),
  ):
    assert cli.main(["calibrate", *odd]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_configurations_count_groups_too(tmp_path):
  output = tmp_path / "chosen.json"
  pairs = [f"{way}={grid(tmp_path / way, [0.01], [4], way, size=4)}" for way in ("a", "b")]
  arguments = ["calibrate", "--configurations", *pairs, f"--output={output}"]
  assert cli.main(arguments) == 0
  found = Calibration.load(output)
  assert found.clusters and found.num_examples == 50 and not found.groups_ignored
  assert cli.main([*arguments, "--ungrouped"]) == 0
  found = Calibration.load(output)
  assert not found.clusters and found.num_examples == 200
  assert "the caller took each for an independent draw" in found.guarantee


def test_verifying_holds_the_sentence_too(tmp_path, capsys):
  arguments = outputs(tmp_path)
  assert cli.main(["calibrate", *arguments]) == 0
  path = tmp_path / "calibration.json"
  value = json.loads(path.read_text())
  value["guarantee"] = value["guarantee"].replace("0.95", "0.99")
  path.write_text(json.dumps({**value, "digest": verification.digest(value)}))
  assert cli.main(["calibrate", *arguments, f"--verify={path}"]) == 2
  assert "to be the sentence of its numbers" in " ".join(capsys.readouterr().err.split())


def test_equal_calls_answer_equally_and_a_drawn_order_is_verified_by_its_seed(tmp_path, capsys):
  arguments = outputs(tmp_path, count=200, wrong=(3, 7))
  rates = ["--method=betting", "--tolerance=0.3", "--metric=exact_match"]
  full = tmp_path / "full.jsonl"
  rows = [json.loads(line) for line in full.read_text().splitlines()]
  write(tmp_path, [{**row, "input": ""} for row in rows], "full.jsonl")
  path = tmp_path / "calibration.json"
  found = []
  for _ in range(2):
    assert cli.main(["calibrate", *arguments, *rates]) == 0
    found.append(path.read_bytes())
  assert found[0] == found[1]
  assert cli.main(["calibrate", *arguments, f"--verify={path}"]) == 0
  said = " ".join(capsys.readouterr().out.split())
  assert "is what these outputs give" in said and "earlier versions" not in said
  cached = foreign.gather(full, {0.5: tmp_path / "early.jsonl"})
  losses = textual_losses(cached, metric="exact_match")
  # As earlier versions drew the order of such outputs.
  certify(losses, tolerance=0.3, error_rate=0.05, method="betting", seed="ab").save(path)
  assert cli.main(["calibrate", *arguments, f"--verify={path}"]) == 0
  said = " ".join(capsys.readouterr().out.split())
  assert "is what these outputs give" in said and "earlier versions drew the order" in said


def test_a_ledger_is_kept_and_says_so(tmp_path, capsys):
  (tmp_path := tmp_path / "runs").mkdir()  # no folder beside it whose ledger would be read
  files = outputs(tmp_path, count=200, wrong=(3, 7))
  said = lambda: " ".join(capsys.readouterr().out.split())
  assert cli.main(["calibrate", *files]) == 0
  assert "calibrated on before" not in said()
  assert cli.main(["calibrate", *files, "--metric=exact_match"]) == 0
  out = said()
  assert "textual, rouge_l" in out and "--error_rate=0.025" in out
  assert cli.main(["calibrate", *files, f"--verify={tmp_path / 'calibration.json'}"]) == 0
  kept = [json.loads(line) for line in (tmp_path / ledger.LEDGER).read_text().splitlines()]
  assert [line["question"]["metric"] for line in kept] == ["rouge_l", "exact_match"]
  several = ["--risks", "textual:rouge_l:0.2", "risk_signed:token_f1:0.2"]
  assert cli.main(["calibrate", *files, *several]) == 0
  assert "each of the 3 again with --error_rate=0.01667" in said()
  (tmp_path / ledger.LEDGER).write_text("damaged\n")
  assert cli.main(["calibrate", *files]) == 0
  assert "could not be recorded" in said()
