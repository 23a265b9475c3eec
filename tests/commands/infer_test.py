"""`calm infer` as people use it: where its lines go, and how it goes on after a
kill.
"""

import dataclasses
import json
import os
import threading

import numpy as np
import pytest

from calm import calibrate, inference, storage
from calm.commands import cli, infer
from calm.inference import predictor, timing
from tests.commands import toy

TEXTS = [f"text {i}" for i in range(7)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("infer") / "prompts.csv"
  path.write_text(
    "id,review\n" + "".join(f"p{i},{text}\n" for i, text in enumerate(TEXTS))
  )
  return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(infer, "FIRST_BATCHES", 1)
  monkeypatch.setattr(infer, "MOST_BATCHES", 1)


@pytest.fixture
def calm_infer(model, prompts, calm):
  def run(*more, model=model, way=("--threshold=never",), code=0) -> str:
    named = [f"--model={model}", f"--prompts={prompts}", "--input_key=review"]
    return calm("infer", *named, *toy.DECODE, *way, *more, code=code)

  return run


@pytest.fixture
def expected(calm_infer, tmp_path):
  calm_infer(f"--output={tmp_path / 'expected.jsonl'}")
  return (tmp_path / "expected.jsonl").read_text()


def ids(text: str) -> list[str]:
  return [json.loads(line)["id"] for line in text.splitlines()]


def stop_after(monkeypatch, chunks: int, half: bytes = b"") -> None:
  """A failure while the chunk after so many is written, of which `half` has got
  there.
  """
  append = storage.append
  done = []

  def stopped(path, content):
    if len(done) == chunks:
      append(path, half)
      raise OSError("stopped")
    done.append(content)
    append(path, content)

  monkeypatch.setattr(storage, "append", stopped)


def test_a_stopped_run_goes_on_where_it_was(
  calm_infer, expected, tmp_path, monkeypatch
):
  assert ids(expected) == [f"p{i}" for i in range(7)]
  output = tmp_path / "out.jsonl"
  output.write_text("an earlier result\n")
  with monkeypatch.context() as patched:
    stop_after(patched, 2, half=b'{"id": "p4", "pre')
    calm_infer(f"--output={output}", code=2)
  assert output.read_text() == "an earlier result\n"
  counts = []
  generate = predictor.Predictor.generate

  def counted(self, texts, **options):
    counts.append(len(texts))
    return generate(self, texts, **options)

  monkeypatch.setattr(predictor.Predictor, "generate", counted)
  assert "4 prompts' outputs are there already" in calm_infer(
    f"--output={output}"
  )
  assert sum(counts) == 3 and output.read_text() == expected
  left = [path.name for path in tmp_path.iterdir()]
  assert not [name for name in left if name.startswith((".", "out.jsonl."))]


def test_every_command_goes_on_from_lines_of_its_own(
  calm_infer, expected, prompts, tmp_path, monkeypatch
):
  output = tmp_path / "out.jsonl"
  other = tmp_path / "other.csv"
  other.write_text(prompts.read_text().replace("text 1", "another text"))
  with monkeypatch.context() as patched:
    stop_after(patched, 1)
    calm_infer(f"--output={output}", code=2)
  (partial,) = tmp_path.glob("out.jsonl.*.partial")
  kept = partial.read_bytes()
  for change in (
    "--threshold=0.5",
    "--max_decode_length=3",
    f"--prompts={other}",
  ):
    assert "are there already" not in calm_infer(f"--output={output}", change)
    assert ids(output.read_text()) == [f"p{i}" for i in range(7)]
    assert partial.read_bytes() == kept
  assert "2 prompts' outputs are there already" in calm_infer(
    f"--output={output}"
  )
  assert output.read_text() == expected and not partial.exists()
  partial.write_text('{"id": "x"}\n')
  assert "got others; take it away" in calm_infer(f"--output={output}", code=2)
  partial.unlink()
  partial.symlink_to(output)
  assert "a link or a device" in calm_infer(f"--output={output}", code=2)


def test_lines_go_to_unnamed_pipes_and_standard_output(calm_infer, expected):
  read, write = os.pipe()
  got = []

  def take():
    with open(read) as end:
      got.append(end.read())

  reader = threading.Thread(target=take)
  reader.start()
  calm_infer(f"--output=/dev/fd/{write}")
  os.close(write)
  reader.join()
  assert got == [expected]
  assert calm_infer("--output=-").startswith('{"id": "p0"')


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_output_that_waits_for_a_reader_is_refused(calm_infer, tmp_path):
  os.mkfifo(pipe := tmp_path / "pipe")
  assert "named pipe" in calm_infer(f"--output={pipe}", code=2)


def test_tokens_are_shown_as_they_come(model, prompts, capsys, monkeypatch):
  words = [
    f"--model={model}",
    f"--prompts={prompts}",
    "--input_key=review",
    *toy.DECODE,
  ]
  words = ["infer", *words, "--threshold=never"]
  assert cli.main(words) == 0
  whole = capsys.readouterr().out
  shown = []
  show = infer.Serving._show

  def counted(self, row, output):
    return (
      shown.append(len(output.tokens)),
      show(self, row, output),
    )

  monkeypatch.setattr(infer.Serving, "_show", counted)
  assert cli.main([*words, "--stream"]) == 0
  assert capsys.readouterr().out == whole
  assert shown[:2] == [1, 2] and shown.count(1) == len(TEXTS)
  assert cli.main([*words, "--stream", "--output=-"]) == 2
  assert "leave `--output` and `--color` out" in capsys.readouterr().err


def test_what_was_read_and_what_it_took_is_said_once(calm_infer):
  printed = calm_infer("--max_input_length=6")
  assert printed.count("7 prompts, CSV, column 'review'") == 1
  assert printed.count("have more than `max_input_length`") == 1
  assert (
    "Warning: 7 of 7 prompts have more than `max_input_length` = 6 tokens"
    in printed
  )
  assert (
    "start-up" in printed and "The full model was used; no guarantee" in printed
  )


def certified(model, path, note=None, **options):
  """A calibration for a model under these options, saved."""
  made = calibrate.calibrate(
    np.zeros((200, 1)), [0.9], tolerance=0.1, error_rate=0.05
  )
  procedure = inference.load(model, **options).procedure
  made = dataclasses.replace(made, procedure=procedure)
  (timing.note(made, note) if note else made).save(path)
  return made


def test_the_models_own_calibration_is_served(prompts, calm, tmp_path):
  model = toy.save_model(tmp_path / "fitted")
  pair = timing.Pair(1, 8, full=4.0, early=2.0, speedup=2.0, end_to_end=1.5)
  made = certified(model, model / "calibration.json", timing.Seconds(pair))
  named = [
    f"--model={model}",
    f"--prompts={prompts}",
    "--input_key=review",
    "--limit=1",
  ]
  assert "`--threshold` beside options" in calm(
    "infer", *named, "--measure=state", code=2
  )
  printed = calm("infer", *named, "--output=-")
  assert made.guarantee.split(".")[0] in printed
  assert (
    "as measured with the calibration: x2.00 one at a time (x1.50" in printed
  )


def test_the_speed_beside_full_depth_is_measured(
  model, prompts, tmp_path, calm, monkeypatch
):
  """Of a calibration that names no seconds; that some prompts are cut is said
  once, of all.
  """
  certified(
    model,
    path := tmp_path / "calibration.json",
    max_input_length=6,
    batch_size=2,
  )
  monkeypatch.setattr(infer, "MEASURED_PROMPTS", 7)
  measure = timing.beside_full_depth

  def measured(*given, **options):
    found = measure(*given, **options)
    single = dataclasses.replace(found.single, speedup=0.9, end_to_end=1.25)
    return dataclasses.replace(found, single=single, batched=None)

  monkeypatch.setattr(timing, "beside_full_depth", measured)
  named = [
    f"--model={model}",
    f"--prompts={prompts}",
    "--input_key=review",
    "--output=-",
  ]
  printed = calm("infer", *named, f"--calibration={path}")
  assert "x0.90 one at a time (x1.25 with the encoder)" in printed
  assert "not faster than full depth" in printed
  assert printed.count("have more than `max_input_length`") == 1


def test_exact_texts_are_the_full_models(calm_infer, expected, tmp_path):
  output = tmp_path / "exact.jsonl"
  # Batches of a model so small have no drafts.
  printed = calm_infer(f"--output={output}", way=("--exact", "--batch_size=1"))
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  plain = [json.loads(line) for line in expected.splitlines()]
  assert [line["tokens"] for line in lines] == [
    line["tokens"] for line in plain
  ]
  assert "the full model's own texts" in printed
  rate = sum(len(line["tokens"]) for line in lines) / sum(
    line["passes"] for line in lines
  )
  assert f"{rate:.2f} tokens a pass" in printed


def test_what_is_read_is_never_replaced(model, tmp_path, calm):
  prompts = tmp_path / "prompts.jsonl"
  full = tmp_path / "full.jsonl"
  prompts.write_text('{"input": "a text"}\n')
  full.write_text('{"id": "a", "prediction": "b"}\n')
  (tmp_path / "link").symlink_to(prompts)
  for output in (prompts, tmp_path / "link"):
    named = [f"--model={model}", f"--prompts={prompts}", f"--output={output}"]
    printed = calm("infer", *named, "--threshold=never", code=2)
    assert "not to be a file that is read" in printed
  named = [f"--full={full}", f"--outputs=0.5={full}", f"--output={full}"]
  assert "not to be a file that is read" in calm("calibrate", *named, code=2)
  assert (
    prompts.read_text() == '{"input": "a text"}\n'
    and "prediction" in full.read_text()
  )
