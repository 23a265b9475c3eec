"""Commands that are printed work as they stand, in an environment that is not activated too."""

import io
import shlex
import sys

import pytest

from calm.commands import cli, following
from tests import toys
from tests.commands import toy


@pytest.fixture
def script(tmp_path, monkeypatch):
  """A `calm` in a folder with a space in its name, called as `quickstart.sh` does."""
  path = tmp_path / "my env" / "calm"
  path.parent.mkdir()
  path.write_text("#!/bin/sh\n")
  path.chmod(0o755)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["my env/calm", "demo"])
  return path


def test_a_script_that_the_shell_does_not_find_is_named_whole(script, monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  assert shlex.split(following.program()) == [str(script)]
  monkeypatch.setenv("PATH", str(script.parent))
  assert following.program() == "calm"


def test_another_calm_of_the_shells_is_not_meant(script, tmp_path, monkeypatch):
  other = tmp_path / "calm"
  other.write_text("#!/bin/sh\n")
  other.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert shlex.split(following.program()) == [str(script)]


def test_a_module_is_called_by_its_interpreter(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["/there/calm/__main__.py"])
  monkeypatch.setenv("PATH", "/nowhere")
  assert shlex.split(following.program()) == [sys.executable, "-m", "calm"]


def test_words_are_for_the_shell():
  said = following.infer("--model=my model", text="it's")
  first, piped = said.split(" | ")
  assert shlex.split(first) == ["echo", "it's"]
  assert shlex.split(piped) == ["calm", "infer", "--model=my model", "--prompts=-"]


def test_what_generate_and_calibrate_end_with_works(
  model, prompts, tmp_path, capsys, monkeypatch
):
  folder = tmp_path / "a cache"
  assert toy.generate(model, prompts, folder) == 0
  said = capsys.readouterr().out.splitlines()[-1]
  assert shlex.split(said) == ["calm", "calibrate", str(folder)]
  assert cli.main([*shlex.split(said)[1:], *toy.CERTIFIES]) == 0
  _, piped = capsys.readouterr().out.splitlines()[-1].split(" | ")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a long text\n")))
  assert cli.main(shlex.split(piped)[1:]) == 0
  assert "With probability at least" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("first", ["softmax", "state"])
def test_what_calibrate_ends_with_over_configurations_works(
  model, tmp_path, capsys, monkeypatch, first
):
  """Each folder of another model, so that the chosen one's is named, wherever it stands."""
  other = toy.save_model(tmp_path / "other model", toys.params(toy.SIZES, 2))
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("".join(f"{text} {number}\n" for text in toy.TEXTS for number in range(6)))
  assert toy.generate(model, prompts, tmp_path / "softmax") == 0
  assert toy.generate(other, prompts, tmp_path / "state", "--measure=state") == 0
  pairs = [f"{name}={tmp_path / name}" for name in ("softmax", "state")]
  output = f"--output={tmp_path / 'chosen.json'}"
  pairs = pairs if first == "softmax" else pairs[::-1]
  assert cli.main(["calibrate", "--configurations", *pairs, *toy.CERTIFIES, output]) == 0
  _, piped = capsys.readouterr().out.splitlines()[-1].split(" | ")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a long text\n")))
  assert cli.main(shlex.split(piped)[1:]) == 0
  assert "With probability at least" in " ".join(capsys.readouterr().err.split())


def test_outputs_of_elsewhere_end_with_no_command(tmp_path, capsys):
  lines = "".join(f'{{"id": "{i}", "prediction": "a b"}}\n' for i in range(60))
  (tmp_path / "full.jsonl").write_text(lines)
  named = [f"--full={tmp_path / 'full.jsonl'}", "--outputs", f"0.5={tmp_path / 'full.jsonl'}"]
  assert cli.main(["calibrate", *named, f"--output={tmp_path / 'c.json'}"]) == 0
  assert "Written to" in capsys.readouterr().out.splitlines()[-1]
