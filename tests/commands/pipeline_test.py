"""Generate, calibrate, infer on a toy model, as a shell runs them."""

import json
import shlex
import shutil

import pytest

from calm.calibrate import Calibration, generations
from tests import toys
from tests.commands import toy


@pytest.fixture
def saved(cached, tmp_path, calm):
  """A calibration of the cached outputs."""
  path = tmp_path / "calibration.json"
  calm("calibrate", cached, *toy.CERTIFIES, f"--output={path}")
  return path


@pytest.fixture
def served(model, prompts, saved):
  """`calm infer` under this calibration."""
  return [
    "infer",
    f"--model={model}",
    f"--prompts={prompts}",
    f"--calibration={saved}",
  ]


def lines_of(path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_calibrate_infer(cached, saved, served, tmp_path, calm):
  loaded = generations.load(cached)
  calibration = Calibration.load(saved)
  assert loaded.ids == tuple(f"p{i}" for i in range(len(toy.TEXTS)))
  assert [len(records) for records in loaded.records] == [len(toy.TEXTS)] * 2
  assert calibration.certified and calibration.threshold == 0.99
  assert [row.mean for row in calibration.rows] == [0.0, 1.0]
  assert calibration.procedure == loaded.procedure
  out = tmp_path / "out.jsonl"
  in_pairs = tmp_path / "in_pairs.jsonl"
  digest = f"--expect_digest={calibration.digest}"
  assert "With probability at least" in calm(*served, f"--output={out}", digest)
  column = loaded.thresholds.tolist().index(calibration.threshold)
  expected = [record.prediction for record in loaded.records[column]]
  assert [line["prediction"] for line in lines_of(out)] == expected
  calm(*served, "--batch_size=2", f"--output={in_pairs}")

  def of(line):
    return (line["id"], line["tokens"], line["exit_layers"])

  assert list(map(of, lines_of(in_pairs))) == list(map(of, lines_of(out)))


def test_infer_refuses_another_procedure_or_digest(served, calm):
  assert "`measure`" in calm(*served, "--measure=state", code=2)
  assert "No guarantee" in calm(*served, "--measure=state", "--void_guarantee")
  assert "another one" in calm(*served, f"--expect_digest={'0' * 64}", code=2)
  own = "calibration.json: expected a calibration, got none"
  assert own in calm(*served[:-1], "--exact", "--expect_digest=0", code=2)


def test_infer_serves_the_configuration_that_was_chosen(model, tmp_path, calm):
  """One of several folders: its measure comes with the calibration.

  What each command ends with is a command that works, with the model that was
  chosen.
  """
  prompts = tmp_path / "prompts.txt"
  other = tmp_path / "other model"
  toy.save_model(other, toys.params(toy.SIZES, 2))
  prompts.write_text(
    "".join(f"{text} {number}\n" for text in toy.TEXTS for number in range(6))
  )
  ways = {"softmax": (model,), "state": (other, "--measure=state")}
  for name, (own, *options) in ways.items():
    assert toy.generate(own, prompts, tmp_path / name, *options) == 0
  saved = tmp_path / "chosen.json"
  out = tmp_path / "out.jsonl"
  pairs = ["--configurations", *(f"{name}={tmp_path / name}" for name in ways)]
  certify = [
    "calibrate",
    *pairs,
    "--error_rate=0.05",
    f"--output={saved}",
    "--tolerance=0.5",
  ]
  words = shlex.split(calm(*certify).partition("Serve it: ")[2])
  assert "With probability at least" in calm(*words[1:])
  found = Calibration.load(saved)
  place = found.promise.place(found.column("rejected"))
  family = found.promise.configurations[place].partition(" at ")[0]
  cached = generations.load(tmp_path / family)
  assert found.certified and found.procedure == cached.procedure
  said = calm(*words[1:-1], f"--prompts={prompts}", f"--output={out}")
  assert f"({family} at {found.threshold}) expected" in said
  column = cached.records[cached.thresholds.tolist().index(found.threshold)]
  assert [
    (line["prediction"], line["exit_layers"]) for line in lines_of(out)
  ] == [(record.prediction, list(record.exit_layers)) for record in column]


def test_demo_decodes_calibrates_and_compares(
  model, tmp_path, calm, capsys, monkeypatch
):
  short = shutil.copytree(model, tmp_path / "short")
  output = tmp_path / "demo"
  own = {
    "max_decode_length": 4,
    "max_input_length": 1024,
    "grid": [0.9, 0.6, 0.3],
  }
  (short / "inference.json").write_text(json.dumps(own))
  words = [f"--model={short}", f"--output={output}", "--limit=2"]
  text = calm("demo", *words, "--tolerance=0.9", "--error_rate=0.2")
  steps = (
    "1. Decode",
    "2. Calibrate",
    "3. Decode",
    "Decoder beside",
    "risk on",
    "4. Outputs",
  )
  assert [text.index(step) for step in steps] == sorted(
    text.index(step) for step in steps
  )
  for word in (
    "certified",
    "full depth",
    "early exit",
    "tolerance 0.9",
    "reference",
    "early ",
  ):
    assert word in text, word
  assert Calibration.load(output / "calibration.json").procedure is not None
  assert generations.load(output).thresholds.tolist() == own["grid"]
  # What it ends with is a command that works as it stands.
  line = text[text.rindex("calm infer ") :]
  text = calm(*shlex.split(line)[1:])
  assert "1 prompt, threshold " in text and "no guarantee is needed" not in text


def test_a_threshold_is_calibrated_while_it_is_served(
  model, prompts, tmp_path, calm
):
  state = tmp_path / "state.jsonl"
  outputs = tmp_path / "out.jsonl"
  words = ["infer", f"--model={model}", f"--prompts={prompts}", *toy.DECODE]
  online = [*words, f"--online={state}", "--tolerance=0.1"]
  said = calm(*online, f"--output={outputs}")
  assert "5 prompts, threshold online" in said
  assert (
    "No threshold is certified now" in said and "5 of 5 served prompts" in said
  )
  assert len(lines_of(outputs)) == 5 and len(lines_of(state)) == 11
  said = calm(*online)  # prompts that were checked are not checked again
  assert "5 of 10 served prompts were checked" in said
  assert len(lines_of(state)) == 11
  assert "`tolerance` 0.2, got 0.1" in calm(
    *online[:-1], "--tolerance=0.2", code=2
  )
  assert "`--metric` needs `--online`" in calm(
    *words, "--threshold=0.5", "--metric=chrf", code=2
  )
  assert "got several of them" in calm(*online, "--threshold=0.5", code=2)
