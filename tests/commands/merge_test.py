"""Shards of a list: who is where, what is refused, and that together they are
the whole.
"""

import json
import shutil
import tracemalloc

import pytest

from calm.calibrate import (
  GenerationsError,
  Prompt,
  Record,
  generations,
  open_writer,
)
from calm.commands import merge
from calm.data.prompt_files import Prompts
from tests.calibrate import laws

GRID = (0.9, 0.5)
COUNT = 60
PROMPTS = [
  Prompt(f"id-{i}", f"input {i}", (), None if i % 3 else f"group-{i // 9}")
  for i in range(COUNT)
]


def record(prompt: Prompt, threshold: float) -> Record:
  text = f"{prompt.input} at {threshold}"
  return Record(prompt.id, text, (5, 1), (2, 3), (0.25, 0.0), (0.0, 0.5), -1.5)


def write(
  folder, number=0, count=1, *, prompts=PROMPTS, procedure=None, grid=GRID
):
  """One shard, as `calm generate` writes it, batches of like prompts first."""
  procedure = procedure or laws.procedure()
  mine, mark = merge.take_shard(Prompts(prompts), number, count)
  at = merge.shard_folder(str(folder), mark)
  if mine:
    writer = open_writer(at, prompts=mine, thresholds=grid, procedure=procedure)
    for threshold in (float("inf"), *grid):
      backwards = sorted(mine, key=lambda p: p.id[::-1])
      writer.append(
        threshold, [record(prompt, threshold) for prompt in backwards]
      )
    writer.finish()
  merge.write_mark(at, mark)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  write(folder)
  merge.merge([folder], folder / "merged")
  return folder / "merged"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("four")
  for number in range(4):
    write(folder, number, 4)
  return folder


@pytest.fixture
def four(written, tmp_path):
  return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


def place(folder, number=0, count=4):
  return folder / f"shard-{number:05d}-of-{count:05d}"


def contents(folder) -> dict[str, bytes]:
  return {
    path.name: path.read_bytes()
    for path in folder.iterdir()
    if path.suffix != ".lock"
  }


def test_a_prompt_has_one_shard_everywhere_and_groups_stay_together():
  # Stored shards are gone on with by later versions: these numbers never
  # change.
  made = [merge.shard_of(Prompt(f"id-{i}", ""), 4) for i in range(8)]
  assert made == [3, 1, 3, 2, 0, 2, 2, 3]
  groups = {(p.group, merge.shard_of(p, 4)) for p in PROMPTS if p.group}
  assert len(groups) == len({group for group, _ in groups}) > 4


def test_four_shards_are_the_whole_byte_for_byte_again_and_after_a_stop(
  four, whole
):
  assert merge.merge([four], four / "merged") == COUNT
  assert contents(four / "merged") == contents(whole)
  loaded = generations.load(four / "merged")
  assert loaded.ids == tuple(prompt.id for prompt in PROMPTS)
  assert loaded.records[1] == tuple(record(prompt, 0.5) for prompt in PROMPTS)
  (four / "merged" / generations.MANIFEST).unlink()
  merge.merge(sorted(four.glob("shard-*"))[::-1], four / "merged")
  assert contents(four / "merged") == contents(whole)


def test_few_prompts_leave_shards_empty(tmp_path):
  for number in range(8):
    write(tmp_path, number, 8, prompts=PROMPTS[:3])
  assert merge.merge([tmp_path], tmp_path / "merged") == 3
  assert generations.load(tmp_path / "merged").ids == ("id-0", "id-1", "id-2")


def mark(folder, change, number=0):
  """Changes the mark of a shard."""
  path = place(folder, number) / merge.MARK
  value = json.loads(path.read_text())
  path.write_text(json.dumps(value | change(value)))


def edited(folder, name):
  """Another file of the first shard."""
  path = place(folder) / name
  path.write_text(path.read_text().replace("input", "output", 1))


def anew(folder, **changes):
  shutil.rmtree(place(folder, 3))
  write(folder, 3, 4, **changes)


OTHER = laws.procedure(measure="state")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda f: mark(f, lambda value: {"positions": value["positions"][1:]}),
      r"every prompt of the list in one shard, got 1 in none and 0 in several",
    ),
    (
      lambda f: edited(f, "prompts.jsonl"),
      r"prompts\.jsonl: .*SHA-256 .* of manifest",
    ),
    (
      lambda f: (place(f, 2) / merge.MARK).unlink(),
      r"that have no complete\.json: .*shard-00002-of-00004; run them again",
    ),
    (
      lambda f: shutil.rmtree(place(f, 1)),
      r"got the --shard_id \[0, 2, 3\] of \[4\]",
    ),
    (
      lambda f: shutil.copytree(place(f), place(f, 9)),
      r"the --shard_id \[0, 0, 1, 2, 3\]",
    ),
    (
      lambda f: anew(f, procedure=OTHER),
      r"a shard of one run: `measure`: expected 'softmax'",
    ),
    (
      lambda f: anew(f, grid=(0.9, 0.4)),
      r"a shard of one run: `thresholds`: expected \[0.9 0",
    ),
    (
      lambda f: mark(f, lambda _: {"kind": "infer"}),
      r"shards of one run, got two",
    ),
    (
      lambda f: anew(f, prompts=[*PROMPTS[:-1], Prompt("a", "b")]),
      "one list of prompts, got two",
    ),
    (shutil.rmtree, "no complete.json"),
  ],
)
def test_what_is_not_one_run_is_refused_and_named(four, damage, message):
  damage(four)
  with pytest.raises(GenerationsError, match=message):
    merge.merge([four], four / "merged")
  assert not (four / "merged" / generations.MANIFEST).exists()


@pytest.mark.parametrize("claim", ["num_prompts", "num_shards"])
def test_what_a_mark_claims_is_not_made_room_for(four, claim):
  for number in range(4):
    mark(four, lambda _: {claim: 10**9, "positions": []}, number)
  tracemalloc.start()
  try:
    with pytest.raises(GenerationsError, match=r"xpected .*, got "):
      merge.merge([four], four / "merged")
    assert tracemalloc.get_traced_memory()[1] < 2**24
  finally:
    tracemalloc.stop()


def test_no_shard_is_written_over(four):
  before = contents(place(four))
  with pytest.raises(GenerationsError, match="`output` beside the shards"):
    merge.merge([four], place(four))
  assert contents(place(four)) == before


@pytest.mark.parametrize(
  ("count", "number", "message"),
  [
    (None, 1, "both `--num_shards` and `--shard_id`, got one"),
    (4, None, "Slurm .*SLURM_ARRAY_TASK_ID"),
    (2, 2, "got 2 of 2; the first shard is 0"),
  ],
)
def test_a_shard_that_is_not_known_is_refused(count, number, message):
  with pytest.raises(ValueError, match=message):
    merge.take_shard(Prompts(PROMPTS), number, count)


def test_shards_are_one_run(model, tmp_path, calm):
  """One row at a time: no prompt's numbers depend on those that are decoded
  beside it.
  """
  prompts = tmp_path / "prompts.jsonl"
  rows = [
    {"id": f"p{i + 5}", "input": f"text {i}", "target": ["x"]} for i in range(7)
  ]
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  named = [
    "generate",
    f"--model={model}",
    f"--prompts={prompts}",
    "--thresholds=0.9,0.5",
  ]
  named += ["--max_input_length=32", "--max_decode_length=4", "--batch_size=1"]
  one = tmp_path / "one"
  many = tmp_path / "many"
  calm(*named, f"--output={one}")
  for number in (1, 0, 1):  # the last is done already
    part = ["--num_shards=2", f"--shard_id={number}", f"--output={many}"]
    assert f"shard-0000{number}-of-00002 is finished" in calm(*named, *part)
  calm("merge", many)
  for name in generations.file_names((0.9, 0.5)):
    ours, theirs = (
      sorted((at / name).read_text().splitlines())
      for at in (many / "merged", one)
    )
    assert ours == theirs and len(ours) == 7
  # another run
  assert "`measure`" in calm(*named, *part, "--measure=state", code=2)
  named, many = (
    ["infer", *named[1:3], "--threshold=0.5", *named[4:]],
    tmp_path / "outputs",
  )
  calm(*named, f"--output={tmp_path / 'one.jsonl'}")
  for number in (1, 0, 1):
    part = ["--num_shards=2", f"--shard_id={number}", f"--output={many}"]
    printed = calm(*named, *part)
  assert "shard-00001-of-00002 is finished already" in printed
  calm("merge", many)
  assert (many / merge.OUTPUTS).read_text() == (
    tmp_path / "one.jsonl"
  ).read_text()
  assert "got another's" in calm(
    *named, *part, "--batch_size=2", "--threshold=never", code=2
  )
  lines = (
    (many / "shard-00001-of-00002" / merge.OUTPUTS).read_text().splitlines()
  )
  (many / "shard-00001-of-00002" / merge.OUTPUTS).write_text(
    "\n".join(lines[1:])
  )
  with pytest.raises(
    GenerationsError, match=rf"of {len(lines)} prompts, .* got"
  ):
    merge.merge([many], tmp_path / "again.jsonl")
  assert not (tmp_path / "again.jsonl").exists()
