"""Prompts from files of every format and from rows in memory; damage is
named.
"""

import gzip
import json
import os
import resource
import sys
import threading

import numpy as np
import pyarrow
import pytest
from pyarrow import ipc, parquet

from calm import storage
from calm.calibrate import Prompt
from calm.data import prompt_files
from tests.spent import Spent

ROWS = [
  {"id": "a", "input": "one, two", "target": ["eins", "uns"], "source": "x"},
  {"id": "b", "input": "three\u2028four", "target": "drei"},
]
PROMPTS = [
  Prompt("a", "one, two", ("eins", "uns"), "x"),
  Prompt("b", "three\u2028four", ("drei",)),
]


def lines(rows) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


PACKED = gzip.compress(lines(ROWS), mtime=0)


def write(folder, name: str, content: bytes):
  path = folder / name
  path.write_bytes(content)
  return path


TEXTS = [Prompt("texts/1", "one"), Prompt("texts/2", "two")]
PLAIN = [
  Prompt("some.txt/1", "[1] one"),
  Prompt("some.txt/2", "{two\u2028lines"),
]
TABLE = [
  Prompt("7", 'one, "two"\nlines', ("eins",)),
  Prompt("8", "three", ("",)),
]
QUOTED = b'id,text,target\n7,"one, ""two""\nlines",eins\n\n8,three,\n'
PLAIN_TEXT = "plain text, a prompt a line"
# File, its content, how it is read, its prompts.
FILES = [
  ("a.ndjson", b"\n" + lines(ROWS), "JSON Lines, key 'input'", PROMPTS),
  ("a", b"\n" + lines(ROWS), "JSON Lines, key 'input'", PROMPTS),
  ("rows.json", lines(ROWS), "JSON Lines, key 'input'", PROMPTS),
  (
    "rows",
    json.dumps(ROWS, indent=2).encode(),
    "a JSON array, key 'input'",
    PROMPTS,
  ),
  ("texts.json", b'["one", "two"]', "a JSON array", TEXTS),
  ("odd", b"{not json}\n", PLAIN_TEXT, [Prompt("odd/1", "{not json}")]),
  ("note", b"[Note] a text\n", PLAIN_TEXT, [Prompt("note/1", "[Note] a text")]),
  (
    "some.txt",
    b"\xef\xbb\xbf[1] one\r\n\n{two\xe2\x80\xa8lines\n",
    PLAIN_TEXT,
    PLAIN,
  ),
  ("rows.csv", QUOTED, "CSV, column 'text'", TABLE),
  (
    "a.tsv",
    b"n\tinput\n1\tgood, very\n",
    "TSV, column 'input'",
    [Prompt("a/1", "good, very")],
  ),
]


@pytest.mark.parametrize(("name", "content", "taken", "prompts"), FILES)
@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress])
def test_formats_are_told_by_name_or_content(
  tmp_path, name, content, taken, prompts, pack
):
  opened = prompt_files.open_prompts(write(tmp_path, name, pack(content)))
  count = "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
  assert opened.taken == f"{tmp_path / name}: {count}, {taken}"
  assert list(opened) == prompts


def save_to_disk(folder, shards, options=None, names=None):
  """As `Dataset.save_to_disk` of Hugging Face's datasets 4.0 writes a
  folder.
  """
  folder.mkdir(parents=True)
  known = [
    f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))
  ]
  for name, columns in zip(known, shards, strict=True):
    table = pyarrow.table(columns)
    with ipc.new_stream(folder / name, table.schema, options=options) as stream:
      stream.write_table(table, max_chunksize=10**7 if options else 1000)
  state = {
    "_data_files": [{"filename": name} for name in names or known],
    "_split": None,
  }
  (folder / "state.json").write_text(json.dumps(state))
  (folder / "dataset_info.json").write_text('{"features": {}}')
  return folder


def shard(begin: int, end: int) -> dict:
  numbers = range(begin, end)
  targets = [None if i == 3 else [f"text {i}"] for i in numbers]
  images = [b"\xff" for _ in numbers]
  return {
    "prompt": [f"p {i}" for i in numbers],
    "targets": targets,
    "image": images,
  }


def test_a_folder_of_datasets_is_read_as_its_rows(tmp_path):
  folder = save_to_disk(tmp_path / "rows", [shard(0, 1200), shard(1200, 1300)])
  opened = prompt_files.open_prompts(folder)
  assert opened.taken == f"{folder}: 1300 prompts, Arrow, column 'prompt'"
  assert (
    opened[1] == Prompt("rows/2", "p 1", ("text 1",))
    and opened[3].targets == ()
  )
  assert opened[-1] == Prompt("rows/1300", "p 1299", ("text 1299",))
  assert prompt_files.open_prompts(folder, limit=2) == opened[:2]
  alone = prompt_files.open_prompts(folder / "data-00001-of-00002.arrow")
  assert [prompt.input for prompt in alone] == [
    prompt.input for prompt in opened[1200:]
  ]
  both = tmp_path / "both"
  (both / "train").mkdir(parents=True)
  (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  with pytest.raises(
    IsADirectoryError, match=r"one split, got .*both' with .*'train', 'test'; "
  ):
    prompt_files.open_prompts(both)
  with pytest.raises(
    IsADirectoryError, match=r"without the state\.json of .*; give a file"
  ):
    prompt_files.open_prompts(both / "train")


PLAIN = ipc.IpcWriteOptions()
ZSTD = ipc.IpcWriteOptions(compression="zstd")
TEXTS_OF_ONE = pyarrow.DictionaryArray.from_arrays([0] * 9, ["text"])


@pytest.mark.parametrize(
  ("columns", "written", "message"),
  [
    (
      {"input": ["0" * 10**7]},
      {"options": ZSTD},
      "plain texts, got packed ones; save as",
    ),
    (
      {"input": TEXTS_OF_ONE},
      {},
      "plain texts, got packed ones; save as JSON Lines",
    ),
    (
      {"input": [True] * 10**6},
      {"options": PLAIN},
      r"to unpack to at most .*JSON Lines",
    ),
    (
      {},
      {"names": ["../other.arrow"]},
      r"'\.\./other\.arrow' is no file of this folder",
    ),
    ({}, {"names": ["/etc/passwd"]}, "'/etc/passwd' is no file of this folder"),
    ({}, {"names": ["data.arrow"]}, r"to be a whole file, got: .*data\.arrow"),
    ({}, {"names": [7]}, r"lists something else .*; save it again"),
  ],
)
def test_a_folder_that_is_not_as_datasets_writes_it_is_refused(
  tmp_path, monkeypatch, columns, written, message
):
  monkeypatch.setattr(storage, "UNPACKED", 2**16)
  folder = save_to_disk(tmp_path / "rows", [columns], **written)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    prompt_files.open_prompts(folder)


def test_standard_input_is_a_file_too_and_a_format_may_be_named(
  tmp_path, monkeypatch
):
  with write(tmp_path, "stream", PACKED).open() as stream:
    monkeypatch.setattr(sys, "stdin", stream)
    opened = prompt_files.open_prompts("-")
  assert opened.taken == "standard input: 2 prompts, JSON Lines, key 'input'"
  assert list(opened) == PROMPTS
  with write(tmp_path, "stream", b'{"input": "a"}\n').open() as stream:
    monkeypatch.setattr(sys, "stdin", stream)
    (named,) = prompt_files.open_prompts("-", format="text")
  assert (named.id, named.input) == ("stdin/1", '{"input": "a"}')
  with pytest.raises(ValueError, match=r"one of .*'json', 'jsonl'.*got 'xml'"):
    prompt_files.open_prompts("-", format="xml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read_once(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  writer = threading.Thread(target=lambda: pipe.write_bytes(lines(ROWS)))
  writer.start()
  opened = prompt_files.open_prompts(pipe)
  writer.join()
  assert list(opened) == PROMPTS


def test_the_limit_leaves_the_rest_unread(tmp_path):
  path = write(tmp_path, "rows.jsonl", lines(ROWS) + b"no json\n")
  assert list(prompt_files.open_prompts(path, limit=2)) == PROMPTS
  with pytest.raises(
    ValueError, match=r"rows\.jsonl:3: expected .*, got invalid JSON"
  ):
    prompt_files.open_prompts(path)
  rows = write(
    tmp_path,
    "bare.jsonl",
    lines([{"input": "a", "target": "b"}, {"input": "x"}]),
  )
  with pytest.raises(
    ValueError, match=r"bare\.jsonl:2: expected a field `target`, got none"
  ):
    prompt_files.open_prompts(rows, require_target=True)
  with pytest.raises(
    FileNotFoundError, match=r"`path`.*missing\.jsonl.*No such file"
  ):
    prompt_files.open_prompts(tmp_path / "missing.jsonl")


def test_texts_and_references_are_found_under_common_keys_or_named_ones(
  tmp_path,
):
  def opened(row, **keys):
    return prompt_files.open_prompts(
      write(tmp_path, "one.jsonl", lines([row])), **keys
    )

  for key in prompt_files.INPUT_KEYS:
    assert [prompt.input for prompt in opened({key: "a", "other": "b"})] == [
      "a"
    ]
  both = {"text": "a", "input": "b"}
  assert [prompt.input for prompt in opened(both)] == ["b"]
  assert [prompt.input for prompt in opened(both, input_key="text")] == ["a"]
  for key in prompt_files.TARGET_KEYS:
    row = {"question": "a", "label": "c", key: "b"}
    assert [prompt.targets for prompt in opened(row)] == [("b",)]
    assert [prompt.targets for prompt in opened(row, target_key="label")] == [
      ("c",)
    ]
  path = write(
    tmp_path, "one.jsonl", lines([{"input": text} for text in ("a", "", " ")])
  )
  taken = prompt_files.open_prompts(path).taken
  assert taken.endswith(
    ": 3 prompts (2 without any text), JSON Lines, key 'input'"
  )


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl", b"", r"a\.jsonl to hold prompts"),
    ("a.txt", b" \n", "no line with text"),
    (
      "a.jsonl",
      b'{"input": "x", "target": ["y", null]}',
      r"a\.jsonl:1: expected `targets`",
    ),
    (
      "a.csv",
      b"x,y\n1,2\n",
      r"a\.csv:2: expected a field `input` or.*--input_key",
    ),
    ("a.csv", b"input,y\n1,2\n3\n", r"a\.csv:3: expected 2 columns.*got 1"),
    ("a.csv", b"input,input\n1,2\n", "different names"),
    (
      "a.jsonl",
      lines([{"input": "a"}, "b"]),
      r"a\.jsonl:2: expected all rows.*got both",
    ),
    (
      "a.jsonl",
      lines([{"input": 3}]),
      r"a\.jsonl:1: expected `input` to be a text, got 3",
    ),
    (  # the third row has no id and is called rows/3, as the first one is
      "rows.jsonl",
      lines([{"id": "rows/3", "input": "a"}, {"input": "b"}, {"input": "c"}]),
      r"rows\.jsonl:3: expected every `id` once, got 'rows/3' of an earlier "
      r"row",
    ),
    ("a.jsonl", b'{"input": "\xe9"}\n', "0xe9 in line 1 of"),
    ("a.txt", "one\ntwo\n".encode("utf-16-le"), r"the byte 0x00 in line 1 of"),
    (
      "a.json",
      b'[{"input": "a"}]\n[{"input": "b"}]',
      r"a whole JSON array, got: .*Extra data",
    ),
    ("a.jsonl", PACKED[:-12], "to be a whole file, got"),
    (
      "a.jsonl",
      b'{"input": "half of \\ud83d"}\n',
      r"a\.jsonl:1: .*surrogate.*character 9",
    ),
    ("a.jsonl", b'{"input": ' + b"[" * 50_000, r"a\.jsonl:1: .*too deep"),
    (
      "a.jsonl.gz",
      gzip.compress(b"a" * 2**20, mtime=0),
      r"lines of at most 262144",
    ),
    ("a.txt.gz", gzip.compress(b"a\n" * 2**19, mtime=0), r"unpack to at most"),
    (
      "a.json.gz",
      gzip.compress(b"[" + b"{}," * 2**13, mtime=0),
      r"unpack to at most",
    ),
    (
      "a.csv.gz",
      gzip.compress(b'input\n"' + b"\n" * 2**15, mtime=0),
      r"unpack to at most",
    ),
    (
      "a.csv",
      b'input\n"' + b"a\n" * 2**18,
      r"a\.csv:\d+: .*field larger than field limit",
    ),
    (
      "a.json",
      b'["' + b"a" * 600_000,
      r"a JSON array of at most 262144 bytes, got more",
    ),
  ],
)
def test_damage_is_named_with_its_line(
  tmp_path, monkeypatch, name, content, message
):
  monkeypatch.setattr(storage, "UNPACKED", 2**16)
  monkeypatch.setattr(storage, "LONGEST_LINE", 2**18)
  with pytest.raises(ValueError, match=message):
    prompt_files.open_prompts(write(tmp_path, name, content))


def test_a_device_without_an_end_is_not_kept_on_the_disk(monkeypatch):
  monkeypatch.setattr(
    prompt_files.tempfile, "TemporaryFile", lambda: pytest.fail("kept")
  )
  with pytest.raises(
    ValueError, match=r"Expected .*/dev/zero.* a file or a pipe, got a device"
  ):
    prompt_files.open_prompts("/dev/zero")


LONG = "x" * 10**6


def repeated(value, count: int):
  """A column of one value, as a dictionary of one."""
  return pyarrow.DictionaryArray.from_arrays(
    [0] * count, pyarrow.array([value])
  )


def one_list(values):
  """All values in the list of one row."""
  offsets = pyarrow.array([0, len(values)], pyarrow.int32())
  return {
    "input": ["a"],
    "targets": pyarrow.ListArray.from_arrays(offsets, values),
  }


SHARED = {
  "use_dictionary": False,
  "column_encoding": {"input": "DELTA_BYTE_ARRAY"},
}
# Name -> (makes the columns, how they are written).
BOMBS = {
  "a text, repeated": (lambda: {"input": repeated(LONG, 20_000)}, {}),
  "a list of one text": (lambda: one_list(repeated(LONG, 20_000)), {}),
  "a text of zeros": (lambda: {"input": [LONG * 500]}, {}),
  "texts that share": (lambda: {"input": [LONG] * 1000}, SHARED),
  "a list of zeros": (
    lambda: one_list(pyarrow.array([0] * 50_000_000, pyarrow.int8())),
    {},
  ),
  "rows of nothing": (
    lambda: {"input": pyarrow.nulls(10_000_000, pyarrow.string())},
    {},
  ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_packed_to_fill_the_memory_is_refused(tmp_path, name):
  made, written = BOMBS[name]
  path = tmp_path / "bomb.parquet"
  common = {
    "store_schema": False,
    "write_statistics": False,
    "compression": "zstd",
  }
  parquet.write_table(pyarrow.table(made()), path, **common, **written)
  assert path.stat().st_size < 500_000
  spent = Spent()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(ValueError, match=r"bomb\.parquet' to .*JSON Lines"):
    list(prompt_files.open_prompts(path))
  assert spent.seconds < 10
  assert (
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  ) * 1024 < 2**30


def rows(count: int) -> dict:
  texts = [
    None if i % 7 == 3 else f"text {i % 5} {'y' * (i % 11)}"
    for i in range(count)
  ]
  kinds = {"large": pyarrow.large_string(), "view": pyarrow.string_view()}
  return {
    "input": texts,
    **{name: pyarrow.array(texts, kind) for name, kind in kinds.items()},
    "category": pyarrow.array(texts).dictionary_encode(),
    "targets": [
      None if i % 5 == 2 else texts[i : i + i % 3] for i in range(count)
    ],
    "numbers": [list(range(i % 4)) for i in range(count)],
    "score": [i / 3 for i in range(count)],
    "image": [b"\xff"] * count,
    "key": pyarrow.array([b"\xff" * 4] * count, pyarrow.binary(4)),
    "day": pyarrow.array(
      [2**40] * count, pyarrow.timestamp("s", "Nowhere/Land")
    ),
  }


SMALL_PAGES = {
  "dictionary_pagesize_limit": 32,
  "write_batch_size": 8,
  "data_page_size": 16,
}


@pytest.mark.parametrize(
  "written", [{}, {"use_dictionary": False}, SMALL_PAGES]
)
def test_rows_are_those_that_were_written(tmp_path, written):
  columns = rows(2500)
  path = tmp_path / "rows.bin"
  parquet.write_table(pyarrow.table(columns), path, **written)
  with prompt_files._opened(path) as opened:
    assert prompt_files._detect_format(opened) == "parquet"
    found = [row.value for row in prompt_files.FORMATS["parquet"][1](opened)]
  plain = {
    name: column
    for name, column in columns.items()
    if name not in ("image", "key", "day")
  }
  assert found == pyarrow.table(plain).to_pylist()
  cut = write(tmp_path, "cut.parquet", path.read_bytes()[:-9])
  with pytest.raises(ValueError, match="expected whole files of columns, got"):
    prompt_files.open_prompts(cut)


COLUMNS = {
  "id": ["a", "b", "c"],
  "input": ["one text", "two", "three"],
  "target": [["x", "y"], ["z"], None],
  "source": [7, 7, 8],
}
WANTED = (
  Prompt("a", "one text", ("x", "y"), "7"),
  Prompt("b", "two", ("z",), "7"),
  Prompt("c", "three", (), "8"),
)


class Frame(dict):
  """What pandas and polars have in common, with numpy's values, as Parquet
  files give them.
  """

  columns = property(lambda self: list(self))


@pytest.mark.parametrize("name", ["numpy", "pandas", "polars"])
def test_a_table_is_read_as_a_file_is(name):
  if name == "numpy":
    targets = [
      np.array(["x", "y"], object),
      np.array(["z"], object),
      float("nan"),
    ]
    frame = Frame(COLUMNS, target=targets, source=np.array([7, 7, 8]))
  else:
    frame = pytest.importorskip(
      name, reason=f"{name} is not installed"
    ).DataFrame(COLUMNS)
  assert (
    prompt_files.prompts_of(frame) == prompt_files.prompts_of(WANTED) == WANTED
  )


def test_what_is_no_prompt_is_named_with_its_number():
  with pytest.raises(TypeError, match="put it in a list"):
    prompt_files.prompts_of("one text")
  with pytest.raises(TypeError, match=r"got nan as number 2; leave it out"):
    prompt_files.prompts_of(["a", float("nan")])
  with pytest.raises(
    ValueError, match=r"prompt 1: expected a field `input` or .*\['words'\]"
  ):
    prompt_files.prompts_of(Frame(words=["a"]))
  with pytest.raises(
    ValueError, match="prompt 2: expected `input` to be a text"
  ):
    prompt_files.prompts_of(Frame(input=["a", float("nan")]))


@pytest.mark.parametrize(
  "texts", ["one text", Frame(COLUMNS), [WANTED[0]], [{"input": "a"}]]
)
def test_what_is_no_list_of_texts_is_refused(texts):
  with pytest.raises(TypeError, match=r"Expected `texts` .*, got .*; .*list"):
    prompt_files.check_texts(texts)
  prompt_files.check_texts(np.array(["a", "b"]))
