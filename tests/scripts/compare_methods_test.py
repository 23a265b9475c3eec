"""The script that puts calibration methods side by side."""

import json
import pathlib
import subprocess
import sys

import numpy as np

from calm.calibrate import Prompt, Record, open_writer

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "compare_methods.py"
LEVELS = [0.9, 0.5]


def write_cache(folder, count=120):
  """At 0.9 nothing differs from the full model, at 0.5 a fifth of the texts do."""
  prompts = [Prompt(f"p{i}", "in", ("a b c",), f"source {i // 2}") for i in range(count)]
  writer = open_writer(folder, prompts=prompts, thresholds=LEVELS, procedure=None)
  for threshold, layers in ((np.inf, 4), (0.9, 3), (0.5, 1)):
    records = [
      Record(
        id=p.id,
        prediction="x y z" if threshold == 0.5 and i % 5 == 0 else "a b c",
        tokens=(3, 4, 1),
        exit_layers=(layers,) * 3,
      )
      for i, p in enumerate(prompts)
    ]
    writer.append(threshold, records)
  writer.finish()


def test_the_table_has_each_methods_threshold_layers_and_violations(tmp_path):
  write_cache(tmp_path / "cache")
  command = [sys.executable, str(SCRIPT), str(tmp_path / "cache"), "--tolerances", "0.1", "0.5"]
  command += ["--splits", "5", "--draws", "20", f"--output={tmp_path / 'table.json'}"]
  result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  written = json.loads((tmp_path / "table.json").read_text())
  assert ["| " + " | ".join(row) + " |" for row in written["rows"]] == lines[4:]
  assert written["columns"][0] == "tolerance" and "compare_methods.py" in written["command"]
  assert lines[0] == "120 prompts, 60 units, textual rouge_l"
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
  assert [row[:4] for row in rows] == [
    ["0.1", "paper", "0.9", "3.00"],
    ["0.1", "auto", "0.9", "3.00"],
    ["0.5", "paper", "0.5", "1.00"],
    ["0.5", "auto", "0.5", "1.00"],
  ]
  assert all(row[6].startswith("0.0 % (0.0 to ") for row in rows)


def test_records_without_exit_layers_are_refused(tmp_path):
  prompts = [Prompt("a", "in"), Prompt("b", "in")]
  writer = open_writer(tmp_path / "cache", prompts=prompts, thresholds=[0.5], procedure=None)
  for threshold in (np.inf, 0.5):
    writer.append(threshold, [Record(id=p.id, prediction="a") for p in prompts])
  writer.finish()
  command = [sys.executable, str(SCRIPT), str(tmp_path / "cache")]
  result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
  assert result.returncode == 2 and "exit_layers" in result.stderr
