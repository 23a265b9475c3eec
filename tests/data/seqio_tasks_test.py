"""seqio tasks: what an example becomes, whole pipelines, metrics and gin
files.
"""

import json
import pathlib

import numpy as np
import pytest

seqio = pytest.importorskip(
  "seqio", reason="seqio (the `train` extra) is not installed"
)
gin = pytest.importorskip("gin")
tf = pytest.importorskip("tensorflow")

from calm.data import prompt_files, seqio_tasks

pytestmark = pytest.mark.tf

BYTES = seqio.ByteVocabulary()
CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "tasks"
LENGTHS = {"inputs": 64, "targets": 12}

ROWS = [
  {"id": "a", "source": "s", "input": "one two", "target": ["un deux", "1 2"]},
  {"id": "b", "input": "three", "target": "trois"},
  {"id": "c", "input": "four and some more", "target": "quatre, et encore"},
]


@pytest.fixture(autouse=True)
def clean_registries():
  before = {*seqio.TaskRegistry.names()}, {*seqio.MixtureRegistry.names()}
  gin.clear_config()
  yield
  gin.clear_config()
  for registry, names in zip(
    (seqio.TaskRegistry, seqio.MixtureRegistry), before, strict=True
  ):
    for name in {*registry.names()} - names:
      registry.remove(name)


@pytest.fixture
def rows_path(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text(
    "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8"
  )
  return path


def examples(task, split="test", **options):
  options = {"sequence_length": LENGTHS, "shuffle": False, **options}
  limit = options.pop("limit", -1)
  return list(
    task.get_dataset(split=split, **options).take(limit).as_numpy_iterator()
  )


def from_rows(name, rows):
  """A registered task with these rows in place of its TFDS data."""
  columns = {key: [row[key] for row in rows] for key in rows[0]}
  source = seqio.FunctionDataSource(
    lambda split, shuffle_files: tf.data.Dataset.from_tensor_slices(columns),
    ["test"],
  )
  return seqio.TaskRegistry.get(name).replace(source=source)


def ids(text):
  return [*BYTES.encode(text), 1]


def test_jsonl_keeps_texts_ids_and_references_and_ends_with_eos(rows_path):
  name = seqio_tasks.jsonl("mine", {"test": rows_path}, BYTES, prefix="say: ")
  first, second, third = examples(seqio.TaskRegistry.get(name))
  assert first["inputs"].tolist() == ids("say: one two")
  assert first["targets"].tolist() == ids("un deux")
  assert first["inputs_pretokenized"] == b"say: one two"
  assert first["targets_pretokenized"] == b"un deux"
  assert first["references"].tolist() == [b"un deux", b"1 2"]
  assert [(row["id"], row["source"]) for row in (first, second)] == [
    (b"a", b"s"),
    (b"b", b""),
  ]
  assert second["references"].tolist() == [b"trois"]
  # Truncated texts end with end-of-text too.
  assert third["targets"].tolist() == [
    *BYTES.encode("quatre, et encore")[:11],
    1,
  ]


def test_shards_are_disjoint_and_together_the_whole(rows_path):
  task = seqio.TaskRegistry.get(
    seqio_tasks.jsonl("mine", {"test": rows_path}, BYTES)
  )
  shards = [
    [row["id"] for row in examples(task, shard_info=seqio.ShardInfo(i, 2))]
    for i in range(2)
  ]
  assert shards == [[b"a", b"c"], [b"b"]]
  assert task.num_input_examples("test") == 3


def test_a_name_is_registered_anew(rows_path):
  for prefix in ("", "other: "):
    name = seqio_tasks.jsonl("mine", {"test": rows_path}, BYTES, prefix=prefix)
    first = examples(seqio.TaskRegistry.get(name))[0]
    assert first["inputs_pretokenized"] == f"{prefix}one two".encode()
  with pytest.raises(ValueError, match="`metric`"):
    seqio_tasks.jsonl("odd", {"test": rows_path}, BYTES, metrics=["entropy"])


def test_tfds_fields_become_prompts_and_references():
  rows = [
    {
      "id": "h1",
      "publisher": "x",
      "article": "Long.\nText",
      "highlights": "Short .",
    }
  ]
  (row,) = examples(from_rows(seqio_tasks.cnn_dailymail(BYTES), rows))
  assert row["inputs"].tolist() == ids("summarize: Long.\nText")
  assert row["targets_pretokenized"] == b"Short ." and row["id"] == b"h1"
  assert row["references"].tolist() == [b"Short ."]
  rows = [{"en": "Hello.", "fr": "Bonjour."}, {"en": "Hello.", "fr": "Salut."}]
  first, second = examples(from_rows(seqio_tasks.wmt15_enfr(BYTES), rows))
  assert first["inputs_pretokenized"] == b"translate English to French: Hello."
  assert second["targets_pretokenized"] == b"Salut."
  assert first["id"] != second["id"] and first["id"].startswith(b"enfr/")
  with pytest.raises(
    ValueError, match=r"`task` to be one of .*, got 'debian_xy'"
  ):
    seqio_tasks.debian("debian_xy", "data", BYTES)


def test_questions_are_spaced_as_t5_spaces_them():
  example = {
    "id": "q",
    "title": "t",
    "question": "Where is  St. John's?",
    "context": "In (New) York.",
    "answers": {"text": ["New York", "York."], "answer_start": [3, 9]},
  }
  row = seqio_tasks.question_example(
    tf.nest.map_structure(tf.constant, example)
  )
  assert (
    row["inputs"]
    == b"question: Where is St . John ' s ? context: In ( New ) York ."
  )
  assert row["targets"] == b"New York"
  assert row["references"].numpy().tolist() == [b"New York", b"York ."]


@pytest.mark.parametrize(
  "config", sorted(path.stem for path in CONFIGS.glob("*.gin"))
)
def test_gin_files_register_their_task(config, rows_path):
  bindings = [
    "from __gin__ import dynamic_registration",
    "import seqio",
    "VOCABULARY = @seqio.ByteVocabulary()",
    f'DATA = "{rows_path.parent}"',
    f'TRAIN = "{rows_path}"',
    f'VALIDATION = "{rows_path}"',
  ]
  gin.add_config_file_search_path(str(CONFIGS.parents[1]))
  # Its rates count the training examples, so there must be some.
  if config == "debian":
    for task in prompt_files.DEBIAN.values():
      path = task.path(rows_path.parent, "train")
      path.parent.mkdir()
      path.with_suffix("").write_bytes(rows_path.read_bytes())
  gin.parse_config(
    f'include "configs/tasks/{config}.gin"\n' + "\n".join(bindings)
  )
  name = gin.query_parameter("%MIXTURE_OR_TASK_NAME").scoped_configurable_fn()
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  assert name in registered
  lengths = gin.query_parameter("%TASK_FEATURE_LENGTHS")
  assert set(lengths) == {"inputs", "targets"}
  provider = seqio.get_mixture_or_task(name)
  assert provider.output_features["targets"].vocabulary == BYTES
  if config == "debian":
    assert {provider.get_rate(task) for task in provider.tasks} == {len(ROWS)}
  if config == "jsonl":
    assert np.array_equal(
      examples(provider, "train")[1]["targets"], ids("trois")
    )
