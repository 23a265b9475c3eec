"""`--num_shards` and `--shard_id` on a toy model."""

import argparse
import json

import pytest

from calm.calibrate import generations
from calm.commands import flags as flags_lib
from calm.commands import shards


def shard(words: str):
  parser = argparse.ArgumentParser()
  flags_lib.add_shared(parser, "num_shards", "shard_id")
  return shards.parse_shard(parser.parse_args(words.split()))


def test_which_shard():
  assert shard("") is None and shard("--num_shards=4 --shard_id=2") == shards.Shard(2, 4)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--shard_id=1", "both `--num_shards` and `--shard_id`, got one"),
    ("--num_shards=4", "Slurm .*SLURM_ARRAY_TASK_ID .*Kubernetes .*JOB_COMPLETION_INDEX"),
    ("--num_shards=2 --shard_id=2", "got 2 of 2"),
  ],
)
def test_a_shard_that_is_not_known_is_refused(words, message):
  with pytest.raises(ValueError, match=message):
    shard(words)


def test_shards_of_generate_and_infer_are_one_run(model, tmp_path, calm):
  """One row at a time: no prompt's numbers depend on those that are decoded beside it."""
  prompts = tmp_path / "prompts.jsonl"
  rows = [{"id": f"p{i + 5}", "input": f"text {i}", "target": ["x"]} for i in range(7)]
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  named = [f"--model={model}", f"--prompts={prompts}"]
  named += ["--max_input_length=32", "--max_decode_length=4", "--batch_size=1"]
  for command, option in (("generate", "--thresholds=0.9,0.5"), ("infer", "--threshold=0.5")):
    one, many = tmp_path / f"{command}-one", tmp_path / command
    calm(command, *named, option, f"--output={one}")
    for number in (1, 0, 1):  # the last is done already
      part = ["--num_shards=2", f"--shard_id={number}", f"--output={many}"]
      printed = calm(command, *named, option, *part)
    assert "shard-00001-of-00002 is finished already" in printed
    calm("merge", many)
  merged = tmp_path / "generate" / "merged"
  for name in ("never", "0.9", "0.5"):
    ours, theirs = (
      (at / f"threshold_{name}.jsonl").read_text().splitlines()
      for at in (merged, tmp_path / "generate-one")
    )
    assert sorted(ours) == sorted(theirs) and len(ours) == 7
  assert generations.load(merged).ids == tuple(f"p{i + 5}" for i in range(7))
  outputs = tmp_path / "infer" / "outputs.jsonl"
  assert outputs.read_text() == (tmp_path / "infer-one").read_text()
  # Another run in the folder of a shard.
  printed = calm("infer", *named, "--threshold=never", *part, code=2)
  assert "`threshold`: '0.5' for 'never'" in printed
  printed = calm("infer", *named, f"--online={tmp_path / 'state'}", *part, code=2)
  assert "in one process: leave" in printed
