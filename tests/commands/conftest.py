"""One toy model, its prompts and what it generated, for all tests of commands."""

import json

import pytest

from calm.commands import cli
from tests.commands import toy


@pytest.fixture
def calm(capsys):
  """Runs a command that ends with `code`; returns what it printed, with single spaces."""

  def run(*words, code=0) -> str:
    capsys.readouterr()
    status, printed = cli.main([str(word) for word in words]), capsys.readouterr()
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
  rows = [{"id": f"p{i}", "input": t, "target": [t]} for i, t in enumerate(toy.TEXTS)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="session")
def cached(model, prompts, tmp_path_factory):
  output = tmp_path_factory.mktemp("cli") / "cache"
  assert toy.generate(model, prompts, output) == 0
  return output
