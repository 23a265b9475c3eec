"""The script that times prompt lists, on a toy model."""

import json
import pathlib
import subprocess
import sys

from calm import checkpoints
from calm.data import vocabulary
from calm.t5 import network
from tests import toys

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "benchmark_lists.py"
SIZES = toys.Config(vocab_size=264, num_pieces=259, num_encoder_layers=1, num_decoder_layers=2)


def test_lists_are_timed_with_and_without_reuse_and_refill(tmp_path):
  checkpoints.save(
    tmp_path / "model",
    toys.params(SIZES, 1),
    network.T5Config(**toys.network_fields(SIZES)),
    vocabulary=vocabulary.ByteVocabulary(extra_ids=0),
  )
  rows = [{"id": f"p{i}", "input": "a b c d"[: 2 * i + 1], "target": ["a"]} for i in range(4)]
  prompts, made = tmp_path / "prompts.jsonl", tmp_path / "lists.json"
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  options = ["--max_input_length=16", "--max_decode_length=4", "--batch_size=2"]
  result = subprocess.run(
    [
      *(sys.executable, str(SCRIPT), f"--model={tmp_path / 'model'}", f"--prompts={prompts}"),
      *(*options, "--thresholds=0.9,0.5", "--threshold=0.5"),
      *("--repeats=2", f"--output={made}"),
    ],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  rows = {row["run"]: row for row in json.loads(made.read_text())["rows"]}
  names = ["full depth", "threshold 0.5"]
  grids = ["grid without reuse", "grid with reuse"]
  assert set(rows) == {*names, *(f"{name}, rows refilled" for name in names), *grids}
  for row in rows.values():
    least, most = map(float, row["range"].split(" - "))
    assert 0 <= least <= row["seconds"] <= most
  replaced = {name for name, row in rows.items() if row["over the same without"]}
  assert replaced == {"grid with reuse", *(f"{name}, rows refilled" for name in names)}
  assert "4 prompts, batches of 2" in result.stdout
  assert "| full depth |" in result.stdout and "over the same without" in result.stdout
