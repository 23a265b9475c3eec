"""To a T5X checkpoint and back: nothing is lost on the way; and how T5X is
installed.
"""

import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from calm import checkpoints, inference
from calm.t5 import parameters
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.ORBAX

GOLDEN = setup.REPOSITORY / "tests" / "golden" / "huggingface"


@pytest.fixture
def there_and_back(tmp_path, monkeypatch):
  """The folder that both scripts make of a checkpoint."""

  def run(name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"scripts.{name}").main()

  def made(checkpoint: str):
    theirs = tmp_path / "theirs"
    ours = tmp_path / "ours"
    run(
      "to_t5x", f"--checkpoint={checkpoint}", f"--output={theirs}", "--step=7"
    )
    step = theirs / "checkpoint_7"
    run(
      "from_t5x",
      f"--checkpoint={step}",
      f"--like={checkpoint}",
      f"--output={ours}",
    )
    return ours

  return made


def test_options_come_back(there_and_back):
  expected = inference.load("packed").options
  found = inference.load(there_and_back("packed")).options
  assert found.shortlist and found.shortlist == expected.shortlist
  assert found == expected


def test_exits_beside_frozen_weights_come_back_bit_for_bit(
  tmp_path, there_and_back
):
  """As parts of T5X's tree, whose options say that they are read."""
  toy = engine.toy(**engine.MAPS)
  folder = tmp_path / "fitted"
  checkpoints.save(folder, toy.params, toy.config, exits_trained=True)
  back = there_and_back(str(folder))
  assert checkpoints.load(back).config == toy.config
  assert parameters.digest(checkpoints.load(back).params) == parameters.digest(
    toy.params
  )
  options = json.loads((back / "inference.json").read_text())
  assert options["propagation"] == "learned" and options["exit_layers"] == [
    1,
    2,
    3,
  ]


def test_a_classifier_that_was_added_comes_back(there_and_back):
  """Hugging Face's own models have none."""
  before, after = map(
    checkpoints.load,
    (GOLDEN / "t5_1_1", there_and_back(str(GOLDEN / "t5_1_1"))),
  )
  assert not before.config.exit_classifier
  assert after.config == dataclasses.replace(
    before.config, exit_classifier=True
  )
  kept = parameters.flatten(before.params)
  found = parameters.flatten(after.params)
  for path, leaf in kept.items():
    np.testing.assert_array_equal(found.pop(path), leaf, err_msg=path)
  assert found.keys() == {
    f"decoder/exit_classifier/{name}" for name in ("kernel", "bias")
  }


def test_the_installer_parses_and_says_how_it_is_used():
  script = str(setup.REPOSITORY / "scripts" / "install_t5x.sh")
  assert subprocess.run(["bash", "-n", script]).returncode == 0
  done = subprocess.run(["bash", script], capture_output=True, text=True)
  assert done.returncode == 2 and "FOLDER/env/bin/activate" in done.stderr
