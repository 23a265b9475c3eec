"""`calm infer` as people use it: where its lines go, and how it goes on after a kill."""

import contextlib
import dataclasses
import io
import json
import os
import stat
import sys
import threading

import numpy as np
import pytest

from calm import calibrate, inference, storage
from calm.calibrate import Prompt, seconds
from calm.commands import cli, results, serving
from calm.decode import compiled, verified_passes
from calm.inference import predictor
from tests.commands import toy

DECODE = [*toy.DECODE, "--threshold=never"]
TEXTS = [f"text {i}" for i in range(7)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("infer") / "prompts.csv"
  path.write_text("id,review\n" + "".join(f"p{i},{text}\n" for i, text in enumerate(TEXTS)))
  return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setattr(serving, "FIRST_BATCHES", 1)
  monkeypatch.setattr(serving, "MOST_BATCHES", 1)


@pytest.fixture
def calm_infer(model, prompts):
  def run(*more, code=0):
    named = [f"--model={model}", f"--prompts={prompts}", "--input_key=review"]
    assert cli.main(["infer", *named, *DECODE, *map(str, more)]) == code

  return run


@pytest.fixture
def expected(calm_infer, tmp_path):
  calm_infer(f"--output={tmp_path / 'expected.jsonl'}")
  return (tmp_path / "expected.jsonl").read_text()


def ids(text: str) -> list[str]:
  return [json.loads(line)["id"] for line in text.splitlines()]


def test_lines_stand_in_the_order_of_the_prompts(expected):
  assert ids(expected) == [f"p{i}" for i in range(7)]


def stop_after(monkeypatch, chunks: int, half: bytes = b"") -> None:
  """Ctrl-C while the chunk after so many is written, of which `half` has got there."""
  append, done = storage.append, []

  def stopped(path, content):
    if len(done) == chunks:
      append(path, half)
      raise KeyboardInterrupt
    done.append(content)
    append(path, content)

  monkeypatch.setattr(storage, "append", stopped)


def count_prompts(monkeypatch) -> list[int]:
  counts, generate = [], predictor.Predictor.generate

  def counted(self, texts, **options):
    counts.append(len(texts))
    return generate(self, texts, **options)

  monkeypatch.setattr(predictor.Predictor, "generate", counted)
  return counts


def test_a_stopped_run_goes_on_where_it_was(
  calm_infer, expected, tmp_path, monkeypatch, capsys
):
  output = tmp_path / "out.jsonl"
  output.write_text("an earlier result\n")
  with monkeypatch.context() as patched:
    stop_after(patched, 2, half=b'{"id": "p4", "pre')
    calm_infer(f"--output={output}", code=130)
  said = " ".join(capsys.readouterr().err.split())
  assert "stopped after 4 of 7 prompts; the same command goes on" in said
  assert output.read_text() == "an earlier result\n"
  counts = count_prompts(monkeypatch)
  calm_infer(f"--output={output}")
  assert sum(counts) == 3
  assert output.read_text() == expected
  assert "4 prompts' outputs already" in " ".join(capsys.readouterr().err.split())
  assert not [
    path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out.jsonl."))
  ]


@pytest.mark.parametrize(
  ("change", "why"),
  [
    ("--threshold=0.5", "another threshold"),
    ("--max_decode_length=3", "another max_decode_length"),
    ("--prompts=other.csv", "other prompts"),
    ("state", "says nothing of itself"),
  ],
)
def test_another_command_starts_anew_and_keeps_what_there_was(
  calm_infer, prompts, tmp_path, monkeypatch, capsys, change, why
):
  output = tmp_path / "out.jsonl"
  with monkeypatch.context() as patched:
    stop_after(patched, 1)
    calm_infer(f"--output={output}", code=130)
  partial = (tmp_path / "out.jsonl.partial").read_text()
  other = tmp_path / "other.csv"
  other.write_text(prompts.read_text().replace("text 1", "another text"))
  if change == "state":
    (tmp_path / "out.jsonl.partial.json").write_text("[]")
  change = change.replace("other.csv", str(other)) if change != "state" else "--threshold=never"
  calm_infer(f"--output={output}", change)
  assert why in " ".join(capsys.readouterr().err.split())
  assert (tmp_path / "out.jsonl.partial.old").read_text() == partial
  assert ids(output.read_text()) == [f"p{i}" for i in range(7)]


def interrupted(path, about):
  """A run that wrote a line and was stopped."""
  with contextlib.suppress(KeyboardInterrupt), results.open_results(str(path), about) as lines:
    list(lines.pending([Prompt("p", "text")]))
    lines.write([Prompt("p", "text")], [f"{about}\n"])
    raise KeyboardInterrupt
  return lines.report


def test_every_change_of_options_keeps_what_there_was(tmp_path):
  pipe = tmp_path / "out.partial.old.3"
  os.mkfifo(pipe)
  told = [interrupted(tmp_path / "out", {"threshold": number}) for number in range(5)]
  names = ["out.partial.old", *(f"out.partial.old.{number}" for number in (2, 4, 5))]
  for number, name in enumerate(names):
    assert (tmp_path / name).read_text() == f"{{'threshold': {number}}}\n"
    assert told[number + 1].endswith(f"starting anew, and keeping it as {name}.")
  assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("what", ["folder", "link", "nowhere"])
def test_what_stands_in_the_place_of_earlier_lines_stays(what, tmp_path):
  old, other = tmp_path / "out.partial.old", tmp_path / "other"
  if what == "folder":
    old.mkdir()
  else:
    old.symlink_to(other)
  if what == "link":
    other.write_text("theirs")
  for number in range(2):
    interrupted(tmp_path / "out", {"threshold": number})
  assert old.is_dir() if what == "folder" else old.is_symlink()
  assert what != "link" or other.read_text() == "theirs"
  assert (tmp_path / "out.partial.old.2").read_text() == "{'threshold': 0}\n"


def test_the_monitors_file_is_not_replaced_by_the_output(calm_infer, tmp_path, capsys):
  (tmp_path / "link").symlink_to(tmp_path / "both")
  calm_infer(f"--output={tmp_path / 'both'}", f"--monitor={tmp_path / 'link'}", code=2)
  assert "another file than `--monitor`, got" in " ".join(capsys.readouterr().err.split())
  assert not (tmp_path / "both").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_stays(calm_infer, expected, tmp_path):
  pipe, got = tmp_path / "pipe", []
  os.mkfifo(pipe)
  reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
  reader.start()
  calm_infer(f"--output={pipe}")
  reader.join()
  assert got == [expected] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
def test_standard_output_gets_the_lines_and_nothing_else(calm_infer, expected, capfd, output):
  capfd.readouterr()
  calm_infer(f"--output={output}")
  assert capfd.readouterr().out == expected


def test_a_device_stays_a_device(calm_infer):
  calm_infer("--output=/dev/null")
  assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_links_are_followed(calm_infer, expected, tmp_path):
  (tmp_path / "folder").mkdir()
  link, file = tmp_path / "link", tmp_path / "folder" / "file.jsonl"
  link.symlink_to("folder/file.jsonl")
  for _ in range(2):  # to be made, then there
    calm_infer(f"--output={link}")
    assert link.is_symlink() and file.read_text() == expected
    file.write_text("older\n")


def test_a_reader_that_has_enough_is_no_error(calm_infer, capfd, monkeypatch):
  def gone(self, prompts, lines):
    raise BrokenPipeError(32, "Broken pipe")

  with monkeypatch.context() as patched, open(os.devnull, "w") as stdout:
    patched.setattr("calm.commands.results.Stream.write", gone)
    patched.setattr(sys, "stdout", stdout)
    calm_infer("--output=-")
  assert "Broken pipe" not in capfd.readouterr().err


def test_what_was_taken_and_what_it_took_is_said_once(calm_infer, capsys):
  calm_infer("--max_input_length=6")
  said = " ".join(capsys.readouterr().err.split())
  assert said.count("7 prompts, CSV, column 'review'") == 1
  assert said.count("have more than `max_input_length`") == 1
  assert "Warning: 7 of 7 prompts have more than `max_input_length` = 6 tokens" in said
  assert "start-up" in said and "compilation" in said and "the full model" in said


def test_json_lines_on_standard_input_are_not_texts(model, monkeypatch, capsys):
  content = json.dumps({"id": "x", "prompt": "a text"}).encode() + b"\n"
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
  assert cli.main(["infer", f"--model={model}", "--prompts=-", "--output=-", *DECODE]) == 0
  made = capsys.readouterr()
  assert ids(made.out) == ["x"]
  assert "standard input: 1 prompt, JSON Lines, key 'prompt'" in " ".join(made.err.split())


def test_the_models_own_calibration_is_served(prompts, tmp_path, capsys):
  model = toy.save_model(tmp_path / "fitted")
  named = [f"--model={model}", f"--prompts={prompts}", "--input_key=review", "--limit=1"]
  made = calibrate.calibrate(np.zeros((200, 1)), [0.9], tolerance=0.1, error_rate=0.05)
  procedure = inference.load(model).procedure
  dataclasses.replace(made, procedure=procedure).save(model / "calibration.json")
  assert "`--threshold` beside options" in toy.failure(
    capsys, ["infer", *named, "--measure=state"]
  )
  assert cli.main(["infer", *named, "--output=-"]) == 0
  assert made.guarantee.split(".")[0] in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("speedup", "slow"), [(1.5, False), (0.9, True)])
def test_the_speed_beside_full_depth_is_said(
  prompts, tmp_path, capsys, monkeypatch, speedup, slow
):
  """Measured on the prompts; that some of them are cut is said once, of all."""
  model = toy.save_model(tmp_path / "fitted")
  made = calibrate.calibrate(np.zeros((200, 1)), [0.9], tolerance=0.1, error_rate=0.05)
  procedure = inference.load(model, max_input_length=6, batch_size=2).procedure
  dataclasses.replace(made, procedure=procedure).save(tmp_path / "calibration.json")
  monkeypatch.setattr(serving, "MEASURED_PROMPTS", 7)
  measure = inference.timing.beside_full_depth

  def measured(predictor, *given, **options):
    found = measure(predictor, *given, **options)
    single = dataclasses.replace(found.single, speedup=speedup, end_to_end=1.25)
    return dataclasses.replace(found, single=single, batched=None)

  monkeypatch.setattr(inference.timing, "beside_full_depth", measured)
  named = [f"--model={model}", f"--prompts={prompts}", "--input_key=review", "--output=-"]
  calibration = f"--calibration={tmp_path / 'calibration.json'}"
  assert cli.main(["infer", *named, calibration]) == 0
  said = " ".join(capsys.readouterr().err.split())
  assert f"x{speedup:.2f} one at a time (x1.25 with the encoder)" in said
  assert ("not faster than full depth" in said) == slow
  assert said.count("have more than `max_input_length`") == 1


@pytest.mark.parametrize(("speedup", "kept"), [(0.7, False), (1.4, True)])
def test_drafts_that_do_not_pay_are_given_up(
  calm_infer, expected, tmp_path, monkeypatch, capsys, speedup, kept
):
  """The texts are the full model's either way: only seconds decide."""
  monkeypatch.setattr(serving, "MEASURED_PROMPTS", 7)
  found = seconds.Pair(2, 4, 1.0, 1.0 / speedup, speedup, speedup)
  monkeypatch.setattr(inference.timing, "exact_beside_full_depth", lambda *asked: found)
  output = tmp_path / "exact.jsonl"
  threshold = toy.DECODE
  # Batches of a model so small have no drafts.
  monkeypatch.setattr(f"{__name__}.DECODE", [*threshold, "--exact", "--batch_size=1"])
  calm_infer(f"--output={output}")
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  plain = [json.loads(line) for line in expected.splitlines()]
  assert [line["tokens"] for line in lines] == [line["tokens"] for line in plain]
  assert "passes" in lines[0] and ("passes" in lines[-1]) == kept
  said = " ".join(capsys.readouterr().err.split())
  assert "the full model's own texts" in said
  assert ("given up after 1 prompt." in said) != kept
  drafted = [line for line in lines if "passes" in line]
  rate = sum(len(line["tokens"]) for line in drafted) / sum(line["passes"] for line in drafted)
  assert f"{rate:.2f} tokens a pass" in said


@pytest.mark.parametrize("measured", [7, 1000])
def test_batches_that_draft_nothing_say_so(calm_infer, tmp_path, monkeypatch, capsys, measured):
  """Nothing is compared there: both would be full depth."""
  monkeypatch.setattr(serving, "MEASURED_PROMPTS", measured)
  monkeypatch.setattr(verified_passes, "MANY_ROWS", 1)
  monkeypatch.setattr(verified_passes, "MANY_ROWS_HOPE", 1e9)
  monkeypatch.setattr(
    inference.timing, "exact_beside_full_depth", lambda *asked: pytest.fail("measured")
  )
  monkeypatch.setattr(f"{__name__}.DECODE", [*toy.DECODE, "--exact"])
  compiled.drop_all()  # those with other plans
  calm_infer(f"--output={tmp_path / 'exact.jsonl'}")
  said = " ".join(capsys.readouterr().err.split())
  assert "No draft was made: in batches of 2" in said and "--batch_size=1 makes" in said
  assert "given up" not in said and "tokens a pass" not in said
  compiled.drop_all()


def test_what_is_read_is_never_replaced(model, tmp_path, capsys):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"input": "a text"}\n')
  (tmp_path / "link").symlink_to(prompts)
  for output in (prompts, tmp_path / "link"):
    named = [f"--model={model}", f"--prompts={prompts}", f"--output={output}"]
    assert cli.main(["infer", *named, *DECODE]) == 2
    assert "another file than those that are read" in capsys.readouterr().err
  full = tmp_path / "full.jsonl"
  full.write_text('{"id": "a", "prediction": "b"}\n')
  named = [f"--full={full}", f"--outputs=0.5={full}", f"--output={full}"]
  assert cli.main(["calibrate", *named]) == 2
  assert "another file than those that are read" in capsys.readouterr().err
  assert prompts.read_text() == '{"input": "a text"}\n' and "prediction" in full.read_text()
