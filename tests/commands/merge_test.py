"""Shards of a list: who is where, what is refused, and that together they are the whole."""

import json
import shutil
import tracemalloc

import pytest
from rich import console as rich_console

from calm.calibrate import GenerationsError, Prompt, Record, generations, open_writer
from calm.commands import merge
from calm.data.prompt_files import Prompts
from tests.calibrate import laws

GRID, COUNT = (0.9, 0.5), 60
CONSOLE = rich_console.Console(quiet=True)
PROMPTS = [
  Prompt(f"id-{i}", f"input {i}", (), None if i % 3 else f"group-{i // 9}")
  for i in range(COUNT)
]


def record(prompt: Prompt, threshold: float) -> Record:
  text = f"{prompt.input} at {threshold}"
  return Record(prompt.id, text, (5, 1), (2, 3), (0.25, 0.0), (0.0, 0.5), -1.5)


def write(folder, number=0, count=1, *, prompts=PROMPTS, procedure=None, grid=GRID):
  """One shard, as `calm generate` writes it, batches of like prompts first."""
  procedure = procedure or laws.procedure()
  part = merge.Shard(Prompts(prompts), number, count, str(folder))
  about = {"procedure": procedure.to_json(), "thresholds": list(grid)}
  part.begin("generate", about, CONSOLE)
  if mine := part.prompts:
    writer = open_writer(part.folder, prompts=mine, thresholds=grid, procedure=procedure)
    for threshold in (float("inf"), *grid):
      backwards = sorted(mine, key=lambda p: p.id[::-1])
      writer.append(threshold, [record(prompt, threshold) for prompt in backwards])
    writer.finish()
  part.finish()


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
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_prompt_has_one_shard_everywhere_and_groups_stay_together():
  # Stored shards are gone on with by later versions: these numbers never change.
  made = [merge.shard_of(Prompt(f"id-{i}", ""), 4) for i in range(8)]
  assert made == [3, 1, 3, 2, 0, 2, 2, 3]
  groups = {(p.group, merge.shard_of(p, 4)) for p in PROMPTS if p.group}
  assert len(groups) == len({group for group, _ in groups}) > 4


def test_four_shards_are_the_whole_byte_for_byte_again_and_after_a_stop(four, whole):
  assert merge.merge([four], four / "merged") == COUNT
  assert contents(four / "merged") == contents(whole)
  loaded = generations.load(four / "merged")
  assert loaded.ids == tuple(prompt.id for prompt in PROMPTS)
  assert loaded.records[1] == tuple(record(prompt, 0.5) for prompt in PROMPTS)
  (four / "merged" / generations.MANIFEST).unlink()
  merge.merge(sorted(four.glob("shard-*"))[::-1], four / "merged")
  assert contents(four / "merged") == contents(whole)


def test_outputs_of_shards_are_one_file_in_the_order_of_the_list(tmp_path):
  def infer(number, lines=None):
    """As `calm infer` writes them, with no newline at the end."""
    part = merge.Shard(Prompts(PROMPTS), number, 2, str(tmp_path))
    lines = lines or [json.dumps({"id": p.id, "prediction": p.input}) for p in part.prompts]
    part.begin("infer", {"threshold": 0.5}, CONSOLE)
    (part.folder / merge.OUTPUTS).write_text("\n".join(lines))
    part.finish()
    return lines

  output, lines = tmp_path / "all.jsonl", [infer(number) for number in range(2)]
  assert merge.merge([tmp_path], output) == COUNT
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert rows == [{"id": p.id, "prediction": p.input} for p in PROMPTS]
  infer(1, lines[1][1:])
  output.unlink()
  with pytest.raises(GenerationsError, match=rf"of {len(lines[1])} prompts, .* got"):
    merge.merge([tmp_path], output)
  assert not output.exists()


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


def swapped_positions(folder):
  """Two shards claim one prompt, and one prompt is claimed by none."""
  (other, *_) = merge.read_mark(place(folder, 1))["positions"]
  mark(folder, lambda value: {"positions": sorted({*value["positions"][1:], other})})


OTHER = laws.procedure(measure="state")


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (
      lambda f: mark(f, lambda value: {"positions": value["positions"][1:]}),
      r"every prompt of the list in one shard, got 1 in none and 0 in several",
    ),
    (swapped_positions, r"every prompt of the list in one shard, got 1 in none and 1 in s"),
    (lambda f: edited(f, "prompts.jsonl"), r"prompts\.jsonl: .*SHA-256 .* of manifest"),
    (
      lambda f: (place(f, 2) / merge.MARK).unlink(),
      r"that have no complete\.json: .*shard-00002-of-00004; run them again",
    ),
    (lambda f: shutil.rmtree(place(f, 1)), r"got the --shard_id \[0, 2, 3\] of \[4\]"),
    (lambda f: shutil.copytree(place(f), place(f, 9)), r"the --shard_id \[0, 0, 1, 2, 3\]"),
    (lambda f: anew(f, procedure=OTHER), r"got two: .* differ: `measure`: 'state' for 'soft"),
    (lambda f: anew(f, prompts=[*PROMPTS[:-1], Prompt("a", "b")]), r"differ: `prompts_digest`"),
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


def test_nothing_else_is_written_over(four, tmp_path):
  before = contents(place(four))
  for inside in ("", "outputs.jsonl"):
    with pytest.raises(GenerationsError, match="`output` beside the shards"):
      merge.merge([four], place(four) / inside)
  assert contents(place(four)) == before
  write(tmp_path / "other", prompts=[Prompt(f"other-{row}", "text") for row in range(3)])
  merge.merge([tmp_path / "other"], tmp_path / "out")
  before = contents(tmp_path / "out")
  with pytest.raises(GenerationsError, match="`prompt_ids`: expected"):
    merge.merge([four], tmp_path / "out")
  assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
  ("count", "number", "message"),
  [
    (None, 1, "both `--num_shards` and `--shard_id`, got one"),
    (4, None, "Slurm .*SLURM_ARRAY_TASK_ID"),
    (2, 2, "got 2 of 2; the first shard is 0"),
  ],
)
def test_a_shard_that_is_not_known_is_refused(count, number, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    merge.Shard(Prompts(PROMPTS), number, count, str(tmp_path))


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
  for name in generations.file_names((0.9, 0.5)):
    ours, theirs = (
      sorted((at / name).read_text().splitlines()) for at in (merged, tmp_path / "generate-one")
    )
    assert ours == theirs and len(ours) == 7
  outputs = tmp_path / "infer" / "outputs.jsonl"
  assert outputs.read_text() == (tmp_path / "infer-one").read_text()
  # Another run in the folder of a shard.
  printed = calm("infer", *named, "--threshold=never", *part, code=2)
  assert "`threshold`: '0.5' for 'never'" in printed
