"""Shards of a list: who is where, what is refused, and that together they are the whole."""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc

import pytest

from calm import storage
from calm.calibrate import GenerationsError, Prompt, Record, generations, open_writer
from calm.commands import shards
from tests.calibrate import laws
from tests.spent import Spent

GRID, COUNT = (0.9, 0.5), 60
PROMPTS = [
  Prompt(f"id-{i}", f"input {i}", (), None if i % 3 else f"group-{i // 9}")
  for i in range(COUNT)
]


def record(prompt: Prompt, threshold: float) -> Record:
  text = f"{prompt.input} at {threshold}"
  return Record(prompt.id, text, (5, 1), (2, 3), (0.25, 0.0), (0.0, 0.5), -1.5)


class Listed(list):
  taken = "a list"


def shard_run(folder, number, count, prompts=PROMPTS):
  return shards.ShardRun(Listed(prompts), shards.Shard(number, count), str(folder))


def write(folder, number=0, count=1, *, prompts=PROMPTS, procedure=None, grid=GRID):
  """One shard, as `calm generate` writes it, batches of like prompts first."""
  procedure = procedure or laws.procedure()
  part = shard_run(folder, number, count, prompts)
  mine, at = list(part), part.folder
  if mine:
    writer = open_writer(at, prompts=mine, thresholds=grid, procedure=procedure)
    for threshold in (float("inf"), *grid):
      done = writer.completed_ids(threshold)
      for prompt in sorted(mine, key=lambda p: p.id[::-1]):
        if prompt.id not in done:
          writer.append(threshold, [record(prompt, threshold)])
    writer.finish()
  names = [generations.PROMPTS, *map(generations.threshold_file, (float("inf"), *grid))]
  about = {"procedure": procedure.to_json(), "thresholds": list(grid)}
  at.mkdir(parents=True, exist_ok=True)
  part.finish("generate", about, names if mine else ())
  return at


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  write(folder)
  shards.merge([folder], folder / "merged")
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


def folders(folder):
  return sorted(folder.glob("shard-*"))


def contents(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_prompt_has_one_shard_everywhere_and_groups_stay_together():
  # Stored shards are gone on with by later versions: these numbers never change.
  def shard_of(prompt):
    (number,) = (number for number in range(4) if shards.Shard(number, 4).has(prompt))
    return number

  assert [shard_of(Prompt(f"id-{i}", "")) for i in range(8)] == [3, 1, 3, 2, 0, 2, 2, 3]
  groups = {(prompt.group, shard_of(prompt)) for prompt in PROMPTS if prompt.group}
  assert len(groups) == len({group for group, _ in groups}) > 4
  with pytest.raises(ValueError, match="got 4 of 4; the first shard is 0"):
    shards.Shard(4, 4)


def test_four_shards_are_the_whole_byte_for_byte(four, whole):
  assert shards.merge([four], four / "merged") == COUNT
  assert contents(four / "merged") == contents(whole)
  loaded = generations.load(four / "merged")
  assert loaded.ids == tuple(prompt.id for prompt in PROMPTS)
  assert loaded.records[1] == tuple(record(prompt, 0.5) for prompt in PROMPTS)
  # Again, and in another order of folders, it is the same.
  shards.merge(folders(four)[::-1], four / "merged")
  assert contents(four / "merged") == contents(whole)


PROCESS = """
import pathlib, sys
from tests.commands import shards_test
shards_test.write(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 4)
"""


def test_four_processes_that_are_killed_give_the_records_of_one(tmp_path, whole):
  rng, kills = random.Random(0), 0
  command = [sys.executable, "-c", PROCESS, str(tmp_path)]
  start = lambda number: subprocess.Popen([*command, str(number)])
  running = {number: start(number) for number in range(4)}
  while running:
    for number, process in list(running.items()):
      folder = tmp_path / shards.Shard(number, 4).name
      if process.poll() is not None:
        assert process.returncode in (0, -signal.SIGKILL)
        del running[number]
        if process.returncode:
          assert not (folder / shards.MARK).exists() or shards.read_mark(folder)
          running[number] = start(number)
      elif kills < 6 and folder.exists() and rng.random() < 0.2:
        process.kill()
        kills += 1
        process.wait()
  assert kills >= 4
  shards.merge([tmp_path], tmp_path / "merged")
  assert contents(tmp_path / "merged") == contents(whole)


def infer(folder, number, count=2, lines=None):
  """One shard, as `calm infer` writes it: last prompts first, no newline at the end."""
  part = shard_run(folder, number, count)
  lines = lines or [json.dumps({"id": p.id, "prediction": p.input}) for p in part]
  (at := part.folder).mkdir(exist_ok=True)
  (at / shards.OUTPUTS).write_text("\n".join(lines))
  part.finish("infer", {"threshold": 0.5}, [shards.OUTPUTS])
  return at, lines


def test_outputs_of_shards_are_one_file_in_the_order_of_the_list(tmp_path):
  for number in range(2):
    infer(tmp_path, number)
  assert shards.merge([tmp_path], tmp_path / "all.jsonl") == COUNT
  rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
  assert rows == [{"id": p.id, "prediction": p.input} for p in PROMPTS]


def test_outputs_that_are_not_one_a_prompt_are_refused(tmp_path):
  infer(tmp_path, 0)
  _, lines = infer(tmp_path, 1)
  infer(tmp_path, 1, lines=lines[1:])
  with pytest.raises(
    GenerationsError, match=rf"of {len(lines)} prompts, .* got {len(lines) - 1}"
  ):
    shards.merge([tmp_path], tmp_path / "all.jsonl")
  assert not (tmp_path / "all.jsonl").exists()


def test_few_prompts_leave_shards_empty(tmp_path):
  for number in range(8):
    write(tmp_path, number, 8, prompts=PROMPTS[:3])
  assert shards.merge([tmp_path], tmp_path / "merged") == 3
  assert generations.load(tmp_path / "merged").ids == ("id-0", "id-1", "id-2")


def place(folder, number):
  return folder / shards.Shard(number, 4).name


def mark(folder, change, number=0):
  """Changes the mark of a shard."""
  path = place(folder, number) / shards.MARK
  value = json.loads(path.read_text())
  path.write_text(json.dumps(value | change(value)))


def edited(folder, name, marked=False):
  """Another file of the first shard; where `marked`, its mark answers for it."""
  path = place(folder, 0) / name
  path.write_text(path.read_text().replace("input", "output", 1))
  if marked:
    mark(
      folder, lambda value: {"checksums": value["checksums"] | {name: storage.checksum(path)}}
    )


def anew(folder, **changes):
  shutil.rmtree(place(folder, 3))
  write(folder, 3, 4, **changes)


def swapped_positions(folder):
  """Two shards claim one prompt, and one prompt is claimed by none."""
  (other, *_) = shards.read_mark(place(folder, 1))["positions"]
  mark(folder, lambda value: {"positions": sorted({*value["positions"][1:], other})})


EARLY, OTHER = "threshold_0.5.jsonl", laws.procedure(measure="state")
ANOTHER_LIST = [*PROMPTS[:-1], Prompt("id-59", "another text")]


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda f: mark(f, lambda value: {"positions": value["positions"][1:]}),
      r"every prompt of the list in one shard, got 1 in none and 0 in several",
    ),
    (swapped_positions, r"every prompt of the list in one shard, got 1 in none and 1 in s"),
    (
      lambda f: [mark(f, lambda value: {"prompts_digest": "d"}, n) for n in range(4)],
      r"prompts\.jsonl: expected, .* the list of prompts of the digest in complete\.json",
    ),
    (
      lambda f: edited(f, "prompts.jsonl", True),
      r"prompts\.jsonl: .*SHA-256 .* of manifest\.json",
    ),
    (
      lambda f: edited(f, EARLY, True),
      r"threshold_0\.5\.jsonl: .*SHA-256 .* of manifest\.json",
    ),
    (
      lambda f: edited(f, EARLY),
      r"threshold_0\.5\.jsonl: expected .* of complete\.json, got an",
    ),
    (
      lambda f: (place(f, 2) / shards.MARK).unlink(),
      r"that have no complete\.json: .*shard-00002-of-00004; run the shards again",
    ),
    (
      lambda f: shutil.rmtree(place(f, 1)),
      r"of all shards of one run, .* got none with --shard_id 1; run",
    ),
    (lambda f: write(f, 0, 3), r"got divisions into 3, 4"),
    (
      lambda f: anew(f, procedure=OTHER),
      r"one run, got two: .* differ: `measure`: expected 'softmax', got 'state'",
    ),
    (
      lambda f: anew(f, grid=(0.9, 0.4)),
      r"differ: `thresholds` \(\[0\.9, 0\.5\], \[0\.9, 0\.4\]\)",
    ),
    (lambda f: anew(f, prompts=ANOTHER_LIST), r"differ: `prompts_digest`"),
  ],
)
def test_what_is_not_one_run_is_refused_and_named(four, damage, message):
  damage(four)
  with pytest.raises(GenerationsError, match=message):
    shards.merge([four], four / "merged")
  assert not (four / "merged" / generations.MANIFEST).exists()


def test_folders_given_twice_or_of_something_else_are_refused(four, tmp_path):
  named = folders(four)
  shutil.copytree(named[0], tmp_path / "copy")
  with pytest.raises(GenerationsError, match=r"got the --shard_id 0 twice"):
    shards.merge([*named, tmp_path / "copy"], four / "merged")
  (tmp_path / "empty").mkdir()
  for name in ("empty", "nowhere"):
    with pytest.raises(GenerationsError, match=rf"no complete.json: .*{name}"):
      shards.merge([tmp_path / name], four / "merged")


@pytest.mark.parametrize("place", ["", "outputs.jsonl", "../{name}"])
def test_a_shard_is_not_merged_into(four, place):
  at = folders(four)[0]
  before = {path.name: path.read_bytes() for path in at.iterdir()}
  with pytest.raises(GenerationsError, match="whose files it would replace; choose another"):
    shards.merge([four], at / place.format(name=at.name))
  assert {path.name: path.read_bytes() for path in at.iterdir()} == before


MANY = 10**9


@pytest.mark.parametrize(
  "change",
  [
    {"num_prompts": MANY},
    {"num_prompts": MANY, "positions": [MANY - 1]},
    {"num_prompts": MANY, "positions": []},
    {"num_prompts": 10**30},
    {"num_shards": MANY},
    {"num_shards": 99_999},
  ],
)
@pytest.mark.parametrize("kind", ["generate", "infer"])
def test_what_a_mark_claims_is_not_made_room_for(four, change, kind):
  for folder in folders(four):
    path = folder / shards.MARK
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": kind, **change}))
  spent = Spent()
  tracemalloc.start()
  try:
    with pytest.raises(GenerationsError, match=r"xpected .*, got "):
      shards.merge([four], four / "merged")
    assert tracemalloc.get_traced_memory()[1] < 2**24
  finally:
    tracemalloc.stop()
  assert spent.seconds < 5


def test_shards_are_not_merged_over_another_list(tmp_path):
  for number in range(4):
    write(tmp_path / "shards", number, 4)
  others = [Prompt(f"other-{row}", "text") for row in range(3)]
  write(tmp_path / "other", prompts=others)
  shards.merge([tmp_path / "other"], tmp_path / "out")
  before = contents(tmp_path / "out")
  with pytest.raises(GenerationsError, match="`prompt_ids`: expected"):
    shards.merge([tmp_path / "shards"], tmp_path / "out")
  assert contents(tmp_path / "out") == before
  (tmp_path / "out" / generations.MANIFEST).unlink()  # prompts of nobody knows which run
  before = contents(tmp_path / "out")
  with pytest.raises(GenerationsError, match="choose another folder"):
    shards.merge([tmp_path / "shards"], tmp_path / "out")
  assert contents(tmp_path / "out") == before


def test_a_merging_that_was_stopped_is_made_again(four, whole):
  for _ in range(2):
    shards.merge([four], four / "out")
    assert contents(four / "out") == contents(whole)
    (four / "out" / generations.MANIFEST).unlink()


def test_merging_makes_no_file_where_a_planted_link_leads(four, tmp_path):
  (folder := tmp_path / "run").mkdir()
  (folder / EARLY).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(OSError, match=rf"{EARLY}' .* got a link to a file that does not exist"):
    shards.merge([four], folder)
  assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
  ("count", "number", "message"),
  [
    (None, 1, "both `--num_shards` and `--shard_id`, got one"),
    (4, None, "Slurm .*SLURM_ARRAY_TASK_ID .*Kubernetes .*JOB_COMPLETION_INDEX"),
    (2, 2, "got 2 of 2"),
  ],
)
def test_a_shard_that_is_not_known_is_refused(count, number, message):
  with pytest.raises(ValueError, match=message):
    shards.parse_shard(argparse.Namespace(num_shards=count, shard_id=number))


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
