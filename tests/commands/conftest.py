"""One toy model, its prompts and what it generated, for all tests of
commands.
"""

import dataclasses
import json

import numpy as np
import pytest

from calm import calibrate, inference
from calm.commands import cli
from tests.calibrate import laws, small_cache
from tests.commands import asked, toy


@pytest.fixture
def calm(capsys):
  """Runs a command that ends with `code`; returns what it printed, with single
  spaces.
  """

  def run(*words, code=0) -> str:
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    assert status == code, printed
    assert "Traceback" not in printed.err
    return " ".join((printed.out + printed.err).split())

  return run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
  return toy.save_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("cli") / "prompts.jsonl"
  rows = [
    {"id": f"p{i}", "input": t, "target": [t]} for i, t in enumerate(toy.TEXTS)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="session")
def cached(model, prompts, tmp_path_factory):
  output = tmp_path_factory.mktemp("cli") / "cache"
  assert toy.generate(model, prompts, output) == 0
  return output


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
  return small_cache.write(tmp_path_factory.mktemp("outputs"), laws.prompts(40))


@pytest.fixture(scope="session")
def calibration(model, tmp_path_factory):
  made = calibrate.calibrate(
    np.zeros((200, 1)), [0.9], tolerance=0.1, error_rate=0.05
  )
  path = tmp_path_factory.mktemp("promise") / "calibration.json"
  dataclasses.replace(made, procedure=inference.load(model).procedure).save(
    path
  )
  return path


@pytest.fixture
def asker(model, outputs, calibration, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "garbage").write_bytes(b"\xff\x00garbage\n" * 9)
  return asked.Asker(model, outputs, calibration, tmp_path, capsys)
