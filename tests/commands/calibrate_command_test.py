"""`calm calibrate` on JSON Lines files alone: groups, promises,
configurations.
"""

import dataclasses
import json

import numpy as np
import pytest

from calm.calibrate import (
  Calibration,
  risks,
)
from calm.commands import calibrate

RISKS = ("--risks", "textual:rouge_l:0.2", "risk_signed:token_f1:0.2")


def write(folder, rows, name):
  path = folder / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def outputs(folder, count=80, groups=None, wrong=()):
  """Options of the full model and of one threshold whose texts differ in the
  rows `wrong`.
  """
  full = []
  early = []
  for row in range(count):
    prompt = {"id": f"p{row}", "input": f"prompt {row}", "targets": ["a b c"]}
    if groups is not None and groups[row] is not None:
      prompt["group"] = groups[row]
    full.append({**prompt, "prediction": "a b c"})
    early.append(
      {"id": f"p{row}", "prediction": "x" if row in wrong else "a b c"}
    )
  files = write(folder, full, "full.jsonl"), write(folder, early, "early.jsonl")
  named = [f"--full={files[0]}", "--outputs", f"0.5={files[1]}"]
  return ["calibrate", *named, f"--output={folder / 'calibration.json'}"]


def test_groups_count_wherever_they_are_known(tmp_path, calm):
  # one without is its own
  groups = [*(f"g{row // 4}" for row in range(79)), None]
  words = outputs(tmp_path, groups=groups)
  saved = tmp_path / "calibration.json"
  printed = calm(*words)  # few: the answer is the full model, and says why
  assert (
    "Nothing can be certified: expected at least 22 clusters of prompts"
    in printed
  )
  assert not Calibration.load(saved).certified
  found = saved.read_bytes()
  assert (
    "80 prompts come in 21 clusters" in calm(*words)
    and saved.read_bytes() == found
  )
  for flags in (["--tolerance=0.2"], RISKS):
    assert "80 prompts come in 21 clusters" in calm(*words, *flags)
    found = Calibration.load(saved)
    assert found.clusters and found.num_examples == 21
    assert "independent draw all the same" in calm(
      *words, *flags, "--ungrouped"
    )
    found = Calibration.load(saved)
    assert (
      found.num_examples == 80 and not found.clusters and found.groups_ignored
    )
    assert "the caller took each for an independent draw" in found.guarantee
  printed = calm(*outputs(tmp_path))  # outputs of elsewhere end with no command
  assert "prompts come in" not in printed and "Serve it" not in printed
  assert "groups_ignored" not in saved.read_text()


def test_promises_are_named_by_flags(tmp_path, calm, monkeypatch):
  words = outputs(tmp_path, count=120, wrong=range(0, 120, 20))
  words += ["--metric=token_f1", "--tolerance=0.2"]
  saved = tmp_path / "calibration.json"
  printed = calm(*words, "--promise=quantile", "--share=0.85")
  assert "for at least 85 % of texts" in printed
  found = Calibration.load(saved)
  assert found.certified and found.promise == risks.Quantile(0.85)
  rows = [{"id": f"p{row}", "label": "xy"[row % 2]} for row in range(120)]
  calm(
    *words,
    "--promise=every_group",
    f"--labels={write(tmp_path, rows, 'labels.jsonl')}",
  )
  assert Calibration.load(saved).promise.groups == ("x", "y")
  calm(*words, "--promise=tail_mean", "--beta=0.5", "--start=0.01")
  assert Calibration.load(saved).promise.name == "tail_mean"
  few = write(tmp_path, rows[1:], "few.jsonl")
  # refused before any text is compared
  monkeypatch.setattr(calibrate, "_losses", None)
  for flags, message in (
    (["--promise=every_group"], "needs `--labels`"),
    (
      ["--promise=every_group", f"--labels={few}"],
      "got none for 1, first ['p0']",
    ),
    (["--promise=cost"], "outputs with `exit_layers`"),
    (["--promise=early_exits", "--depths=3"], "outputs with `exit_layers`"),
    (["--promise=quantile", "--share=2"], "`share`"),
  ):
    assert message in calm(*words, *flags, code=2)


def test_knobs_are_thresholds_throughout_or_not_at_all():
  assert calibrate._parse_knobs(["0.9", "0.5"]) == [0.9, 0.5]
  assert calibrate._parse_knobs(["base", "tiny"]) == ["base", "tiny"]
  with pytest.raises(
    ValueError, match=r"another knob, got both: \['0.9', '12'\]"
  ):
    calibrate._parse_knobs(["0.9", "12"])


def test_references_are_wanted_only_where_texts_differ(tmp_path, calm):
  words = outputs(tmp_path, wrong=(3, 50))
  words += ["--kind=risk_clipped", "--metric=token_f1"]
  full = tmp_path / "full.jsonl"
  saved = tmp_path / "calibration.json"
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


def grid(
  folder, rates, layers, measure="softmax", count=400, seed=0, size=None
):
  """A folder as of `calm generate`: at each threshold some texts differ, all of
  one depth.
  """
  from calm.calibrate import Prompt, Record, open_writer
  from tests.calibrate import laws

  generator = np.random.default_rng(seed)

  def group(row):
    return size and f"article {row // size}"

  prompts = [
    Prompt(f"p{row}", f"prompt {row}", ("a b c",), group(row))
    for row in range(count)
  ]
  procedure = dataclasses.replace(laws.procedure(), measure=measure)
  levels = [0.9, 0.5][: len(rates)]
  writer = open_writer(
    folder, prompts=prompts, thresholds=levels, procedure=procedure
  )
  ways = zip([float("inf"), *levels], [0.0, *rates], [8, *layers], strict=True)
  for threshold, rate, depth in ways:
    texts = ["x" if bad else "a b c" for bad in generator.random(count) < rate]
    numbers = {"exit_layers": (depth,), "tokens": (3,)}
    pairs = zip(prompts, texts, strict=True)
    writer.append(
      threshold, [Record(p.id, text, **numbers) for p, text in pairs]
    )
  writer.finish()
  return folder


def test_several_risks_are_named_by_flags(tmp_path, calm):
  folder = grid(tmp_path / "cache", [0.01, 0.3], [6, 2])
  risks = ["--risks", "textual:rouge_l:0.1", "risk_clipped:token_f1:0.05"]
  printed = calm("calibrate", folder, *risks)
  assert (
    "textual loss (rouge_l) of at most 0.1 and risk_clipped loss (token_f1) of"
  ) in printed
  found = Calibration.load(folder / "calibration.json")
  assert found.promise.name == "several_risks" and found.promise.tolerances == (
    0.1,
    0.05,
  )
  assert found.threshold == 0.9
  for odd in (
    "textual:rouge_l",
    "textual:rouge_l:2",
    "textual::0.1",
    "other:rouge_l:0.1",
  ):
    assert "Expected" in calm("calibrate", folder, "--risks", odd, code=2)
  with pytest.raises(SystemExit, match="2"):
    calm("calibrate", folder, *risks, "--promise=quantile")
  for name, flags in (("cost", []), ("early_exits", ["--depths=6,8"])):
    calm("calibrate", folder, f"--promise={name}", *flags)
    assert Calibration.load(folder / "calibration.json").promise.name == name


def test_the_cheapest_of_several_folders(tmp_path, calm):
  one = grid(tmp_path / "softmax", [0.01, 0.3], [6, 2])
  two = grid(tmp_path / "state", [0.02], [4], measure="state", seed=1)
  output = tmp_path / "chosen.json"
  pairs = ["--configurations", f"softmax={one}", f"state={two}"]
  risks = ["--risks", "textual:rouge_l:0.1", "risk_signed:token_f1:0.1"]
  printed = calm("calibrate", *pairs, *risks, f"--output={output}")
  assert (
    "Calibrated configuration: state at 0.9 (state at 0.9 is the cheapest (4)"
    in printed
  )
  found = Calibration.load(output)
  assert found.threshold == 0.9 and found.procedure.measure == "state"
  assert found.promise.name == "configurations" and found.num_examples == 400
  # Without --risks: the one of --kind, --metric and --tolerance.
  printed = calm("calibrate", *pairs, f"--output={output}", "--tolerance=0.001")
  assert "Calibrated configuration: never" in printed
  for odd, message in (
    ([*pairs], "`--configurations` needs `--output`"),
    (
      [one, *pairs, f"--output={output}"],
      "`--configurations` needs `--output`",
    ),
    (["--configurations", one, f"--output={output}"], "NAME=DIR"),
  ):
    assert message in calm("calibrate", *odd, code=2)
