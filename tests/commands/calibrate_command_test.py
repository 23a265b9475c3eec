"""`calm calibrate` on JSON Lines files alone: groups, promises, tampered files."""

import json

from calm.calibrate import Calibration
from calm.commands import cli


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


def test_by_group_refuses_a_prompt_without_a_group(tmp_path, capsys):
  groups = [f"g{row // 4}" for row in range(80)]
  bare = outputs(tmp_path, groups=[*groups[:-1], None])
  assert cli.main(["calibrate", *bare, "--by_group"]) == 2
  error = capsys.readouterr().err
  assert "all have a `group`" in error and "p79" in error
  rates = ["--tolerance=0.2", "--by_group"]
  assert cli.main(["calibrate", *outputs(tmp_path, groups=groups), *rates]) == 0
  found = Calibration.load(tmp_path / "calibration.json")
  assert found.clusters and found.num_examples == 20


def test_groups_that_are_not_used_are_spoken_of(tmp_path, capsys):
  groups = [f"g{row // 4}" for row in range(80)]
  assert cli.main(["calibrate", *outputs(tmp_path, groups=groups)]) == 0
  assert "80 prompts come in 20 groups" in " ".join(capsys.readouterr().out.split())
  assert Calibration.load(tmp_path / "calibration.json").num_examples == 80
  assert cli.main(["calibrate", *outputs(tmp_path)]) == 0
  assert "prompts come in" not in capsys.readouterr().out


def test_the_same_files_give_the_same_calibration(tmp_path):
  arguments = outputs(tmp_path, wrong=(3, 7))
  for _ in range(2):
    assert cli.main(["calibrate", *arguments, "--metric=token_f1", "--tolerance=0.3"]) == 0
    found = (tmp_path / "calibration.json").read_text()
  assert cli.main(["calibrate", *arguments, "--metric=token_f1", "--tolerance=0.3"]) == 0
  assert (tmp_path / "calibration.json").read_text() == found
