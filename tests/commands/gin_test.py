"""Gin files that are wrong: every line of one is cut, every value of one is exchanged."""

import re

import pytest

from calm.training import configs
from tests.commands import asked

VALUES = ("None", "-1", "0", "1.5", "1" + "0" * 30, "'x'")
# Parameter -> values that mean something.
FAIR = {
  "network.T5Config.dropout_rate": ("0",),
  "training.Schedule.peak": ("0", "1.5"),
  "training.Schedule.warmup_steps": ("0",),
}


@pytest.fixture
def asker(model, tmp_path, capsys, monkeypatch):
  asked.stop_at_work(monkeypatch, "train")
  monkeypatch.chdir(tmp_path)
  return asked.Asker(model, None, None, tmp_path, capsys)


def parameters() -> list[str]:
  """The parameters with plain values that `configs/train/local_tiny.gin` binds."""
  found, block = [], ""
  for line in (
    (configs.root() / "configs" / "train" / "local_tiny.gin").read_text().splitlines()
  ):
    if made := re.fullmatch(r"([\w./]+):", line):
      block = made[1]
    elif made := re.fullmatch(r"  (\w+) = ([^@%]+)", line):
      found.append(f"{block}.{made[1]}")
  return found


def test_exchanged_values_are_refused(asker):
  names = parameters()
  assert len(names) > 15
  wrong = []
  for name in names:
    for value in VALUES:
      words = [*asker.words("train", "--none"), f"--gin_bindings={name} = {value}"]
      try:
        status, told = asker.ask(words)
      except Exception as error:
        status, told = "traceback", f"{type(error).__name__}: {error}"  # gin hides it in repr
      if status == "taken" and value not in FAIR.get(name, ()):
        wrong.append(f"silent {name} = {value}")
      elif status not in (2, "taken") or "Traceback" in told:
        wrong.append(f"{status} {name} = {value}: {told[-200:]}")
      elif asker.slow:
        wrong.append(f"{asker.seconds:.0f} s {name} = {value}")
      elif status == 2 and name.rpartition(".")[2] not in told:
        wrong.append(f"vague {name} = {value}: {told[-200:]}")
  assert not wrong, "\n".join(wrong)


def test_cut_lines_are_named_with_their_place(asker, tmp_path):
  lines = (configs.root() / "configs" / "train" / "local_tiny.gin").read_text().splitlines()
  numbers = [i for i, line in enumerate(lines) if "=" in line and not line.startswith("#")]
  assert len(numbers) > 30
  for number in numbers:
    cut = [*lines[:number], lines[number].partition("=")[0] + "= ("]
    (tmp_path / "cut").write_text("\n".join([*cut, *lines[number + 1 :]]) + "\n")
    words = ["train", f"--gin_file={tmp_path / 'cut'}", f"--output_dir={tmp_path / 'new'}"]
    status, told = asker.ask(words)
    assert status == 2 and told.count("\n") == 1 and f"{tmp_path / 'cut'}:" in told, told
    assert not asker.slow, asker.seconds


LOCAL = "include 'configs/train/local_tiny.gin'\n"


# Name -> (the file, what is said).
MUCH = {
  "a macro of itself": (
    f"{LOCAL}A = [%B, %B]\nB = [%A, %A]\nTRAIN = %A\nVOCABULARY_PATH = 'none'\n",
    "too deep in one another",
  ),
  "depth": (f"{LOCAL}TRAIN = {'[' * 5000}{']' * 5000}\n", "values too deep"),
}


@pytest.mark.parametrize("name", MUCH)
def test_what_stands_for_much_is_refused_at_once(asker, tmp_path, name):
  text, message = MUCH[name]
  (tmp_path / "much").write_text(text)
  words = ["train", f"--gin_file={tmp_path / 'much'}", f"--output_dir={tmp_path / 'new'}"]
  status, told = asker.ask(words)
  assert status == 2 and message in " ".join(told.split()), told
  assert not asker.slow, asker.seconds
