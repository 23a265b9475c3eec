"""`--num_shards` on a toy model, and where the number of a process is taken from."""

import argparse
import json
import types

import pytest

from calm.calibrate import generations
from calm.calibrate.generations import shards
from calm.commands import flags as flags_lib
from calm.commands import run as run_lib

SLURM = {
  **{"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1"},
  **{"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
}


def shard(words: str, environment):
  parser = argparse.ArgumentParser()
  flags_lib.add_shared(parser, "num_shards", "shard_id")
  return run_lib.shard(parser.parse_args(words.split()), environment)


@pytest.mark.parametrize(
  ("words", "environment", "expected"),
  [
    ("", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
    ("--num_shards=4 --shard_id=2", {"JOB_COMPLETION_INDEX": "1"}, (2, 4)),
    ("--num_shards=4", {"JOB_COMPLETION_INDEX": "1"}, (1, 4)),
    ("--num_shards=4", {"SLURM_ARRAY_TASK_ID": "3"}, (3, 4)),
    ("--num_shards=auto", SLURM, (2, 4)),
  ],
)
def test_which_shard(words, environment, expected):
  assert shard(words, environment) == (expected and shards.Shard(*expected))


def test_jax_tells_where_it_was_started_as_several(monkeypatch):
  several = types.SimpleNamespace(
    distributed=types.SimpleNamespace(is_initialized=lambda: True),
    process_index=lambda: 1,
    process_count=lambda: 3,
  )
  with monkeypatch.context() as patched:
    patched.setitem(run_lib.sys.modules, "jax", several)
    assert shard("--num_shards=auto", {}) == shards.Shard(1, 3)


@pytest.mark.parametrize(
  ("words", "environment", "message"),
  [
    ("--shard_id=1", {}, "`--shard_id` needs `--num_shards`"),
    ("--num_shards=4", {}, "neither JOB_COMPLETION_INDEX"),
    (
      "--num_shards=auto",
      {"JOB_COMPLETION_INDEX": "1"},
      "of a Kubernetes job its `completions`",
    ),
    ("--num_shards=-1 --shard_id=0", {}, "to be a number or 'auto', got '-1'"),
    ("--num_shards=0 --shard_id=0", {}, "got 0 of 0"),
    ("--num_shards=2 --shard_id=2", {}, "got 2 of 2"),
    ("--num_shards=2", {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX to be a whole"),
  ],
)
def test_a_shard_that_is_not_known_is_refused(words, environment, message):
  with pytest.raises(ValueError, match=message):
    shard(words, environment)


def test_shards_of_generate_and_infer_are_one_run(model, tmp_path, calm, cache_in_tmp):
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
