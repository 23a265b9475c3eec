"""The walk-through runs, cell after cell, on the packed model."""

import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "walkthrough.py"


def test_it_has_cells_and_says_what_they_do():
  text = SCRIPT.read_text("utf-8")
  cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
  titles = [m for cell in cells for m in re.findall(r"^# #+ (.+)$", cell, flags=re.MULTILINE)]
  assert titles[1:] == ["Load", "Decode", "Look at the exits", "Calibrate", "Plot"]


def test_it_runs_from_end_to_end(tmp_path):
  drawn = tmp_path / "tradeoff.svg"
  done = subprocess.run(
    [sys.executable, str(SCRIPT), "--prompts=16", "--tolerance=0.4", f"--figure={drawn}"],
    cwd=SCRIPT.parent.parent,
    env={**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)},
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert done.returncode == 0, done.stderr
  assert "layers a token" in done.stdout and "[8]" in done.stdout
  assert "threshold: " in done.stdout and "8 outputs, threshold" in done.stdout
  assert len(re.findall(r"^layer \d:", done.stdout, flags=re.MULTILINE)) == 8
  ElementTree.parse(drawn)
