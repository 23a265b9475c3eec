"""`--num_shards` on a toy model, and where the number of a process is taken from."""

import argparse
import json
import types

import pytest

from calm.calibrate import generations
from calm.calibrate.generations import shards
from calm.commands import cli, sharding


def flags(*words):
  parser = argparse.ArgumentParser()
  sharding.add_arguments(parser)
  return parser.parse_args(words)


@pytest.mark.parametrize(
  ("words", "environment", "expected"),
  [
    ((), {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, None),
    (("--num_shards=4", "--shard_id=2"), {"JOB_COMPLETION_INDEX": "1"}, (2, 4)),
    (("--num_shards=4",), {"JOB_COMPLETION_INDEX": "1"}, (1, 4)),
    (("--num_shards=4",), {"SLURM_ARRAY_TASK_ID": "3"}, (3, 4)),
    (
      ("--num_shards=auto",),
      {
        **{"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1"},
        **{"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
      },
      (2, 4),
    ),
  ],
)
def test_which_shard(words, environment, expected):
  wanted = None if expected is None else shards.Shard(*expected)
  assert sharding.shard(flags(*words), environment) == wanted


def test_jax_tells_where_it_was_started_as_several(monkeypatch):
  several = types.SimpleNamespace(
    distributed=types.SimpleNamespace(is_initialized=lambda: True),
    process_index=lambda: 1,
    process_count=lambda: 3,
  )
  with monkeypatch.context() as patched:
    patched.setitem(sharding.sys.modules, "jax", several)
    found = sharding.shard(flags("--num_shards=auto"), {})
  assert found == shards.Shard(1, 3)


@pytest.mark.parametrize(
  ("words", "environment", "message"),
  [
    (("--shard_id=1",), {}, "Expected `--num_shards` beside"),
    (("--num_shards=4",), {}, "neither JOB_COMPLETION_INDEX"),
    (("--num_shards=auto",), {"JOB_COMPLETION_INDEX": "1"}, "does not tell its `completions`"),
    (("--num_shards=-1", "--shard_id=0"), {}, "to be a number or 'auto', got '-1'"),
    (("--num_shards=0", "--shard_id=0"), {}, "got 0 of 0"),
    (("--num_shards=2", "--shard_id=2"), {}, "got 2 of 2"),
    (("--num_shards=2",), {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX to be a whole"),
  ],
)
def test_what_cannot_be_told_is_asked_for(words, environment, message):
  with pytest.raises(ValueError, match=message):
    sharding.shard(flags(*words), environment)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp("sharding") / "prompts.jsonl"
  rows = [{"id": f"p{i + 5}", "input": f"text {i}", "target": ["x"]} for i in range(7)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def calm(command, model, prompts, output, *more):
  decode = ["--max_input_length=32", "--max_decode_length=4", "--batch_size=1", *more]
  given = [f"--model={model}", f"--prompts={prompts}", f"--output={output}"]
  return cli.main([command, *given, *decode])


def test_shards_of_generate_and_infer_are_one_run(model, prompts, tmp_path, capsys):
  """One row at a time: no prompt's numbers depend on those that are decoded beside it."""
  for command, option in (("generate", "--thresholds=0.9,0.5"), ("infer", "--threshold=0.5")):
    one, many = tmp_path / f"{command}-one", tmp_path / command
    assert calm(command, model, prompts, one, option) == 0
    for number in (1, 0, 1):  # the last is done already
      shard = ["--num_shards=2", f"--shard_id={number}"]
      assert calm(command, model, prompts, many, option, *shard) == 0
    said = capsys.readouterr()
    assert "shard-00001-of-00002 is finished already" in " ".join(
      (said.out + said.err).replace("\n", "").split()
    )
    assert cli.main(["merge", str(many)]) == 0
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


def test_another_run_in_the_folder_of_a_shard_is_refused(model, prompts, tmp_path, capsys):
  shard = ["--num_shards=1", "--shard_id=0"]
  assert calm("infer", model, prompts, tmp_path, "--threshold=never", *shard) == 0
  capsys.readouterr()
  assert calm("infer", model, prompts, tmp_path, "--threshold=0.5", *shard) == 2
  said = " ".join(capsys.readouterr().err.split())
  assert "`about` of this run, got another: `threshold`: expected 'never', got '0.5'" in said
  assert calm("generate", model, prompts, tmp_path, "--until_certified", *shard) == 2
  assert "no `--num_shards` with `--until_certified`" in " ".join(
    capsys.readouterr().err.split()
  )
