"""Tokenizers of other models and of nobody's: refused by name when they are opened or used."""

import base64
import json
import pathlib
import subprocess
import sys

import pytest

from calm.checkpoints import huggingface
from calm.data import vocabulary
from tests import toy_vocabulary

CONFIG = {"model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}


def write_config(folder, **changes):
  (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), "utf-8")


def write_tokenizer(path, tokens, special):
  tokenizers = pytest.importorskip("tokenizers")
  ids = {token: number for number, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
  made.add_special_tokens(special)
  made.save(str(path))


def test_pieces_that_end_a_text_otherwise_than_the_model_are_refused(tmp_path):
  toy_vocabulary.train(tmp_path / "spiece.model", unk_id=1, eos_id=2)
  write_config(tmp_path)
  with pytest.raises(ValueError, match=r"token 1 \(`eos_token_id`\), got 2"):
    huggingface.read_vocabulary(tmp_path)
  for ends in (2, [2, 7], [7, 2], None):
    write_config(tmp_path, eos_token_id=ends)
    made = huggingface.read_vocabulary(tmp_path)
    assert made is not None and made.eos_id == 2


def test_a_tokenizer_whose_end_is_another_token_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  write_tokenizer(path, ["[PAD]", "[unused1]", "<unk>", "[SEP]"], ["[PAD]", "<unk>", "[SEP]"])
  write_config(tmp_path)
  with pytest.raises(ValueError, match=r"special token at 1.*got '\[unused1\]'"):
    huggingface.read_vocabulary(tmp_path)
  assert vocabulary.TokenizerVocabulary(path, eos_id=3).eos_id == 3


def repeated(step, count):
  return {"type": "Sequence", "normalizers": [step] * count}


def charsmap(content):
  return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def replace(pattern, content):
  return {"type": "Replace", "pattern": pattern, "content": content}


FIXED = {
  **dict(
    direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="<pad>"
  ),
  "strategy": {"Fixed": 10**9},
}
TEMPLATE = {
  **dict(type="TemplateProcessing", special_tokens={}, pair=[]),
  "single": [
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<absent>", "type_id": 0}},
  ],
}


@pytest.fixture
def changed(tmp_path):
  """Writes a whole tokenizer with some fields exchanged; returns its path."""

  def write(**fields):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, ["<pad>", "</s>", "<unk>", "a"], ["<pad>", "</s>", "<unk>"])
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **fields}))
    return path

  return write


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("normalizer", replace({"Regex": "(a+)+c"}, "x")),
    ("post_processor", TEMPLATE),
    ("decoder", {"type": "Strip", "content": "a", "start": 0, "stop": 10**9}),
  ],
)
def test_what_panics_in_the_package_is_refused_by_name(changed, name, value):
  path = changed(**{name: value})
  with pytest.raises(ValueError, match=r"Expected '.*tokenizer\.json' to (be|have|give)"):
    made = vocabulary.TokenizerVocabulary(path)
    made.decode([*made.encode("a" * 40), 3])


IN_LITTLE_MEMORY = """
import resource, sys
from calm.data import vocabulary

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[1:]:
  try:
    made = vocabulary.TokenizerVocabulary(path)
    print(made.encode("a" * 9), made.decode([3]))
  except ValueError as error:
    print(str(error).replace("\\n", " "))
"""
REFUSED, READ = "Expected '", "[2] a"
SMALL = (
  ({"padding": FIXED}, READ),
  ({"normalizer": charsmap(b"\xf0\xff\xff\xff" + b"\xff" * 40)}, REFUSED),
  ({"normalizer": repeated(replace({"String": "a"}, "aa"), 40)}, REFUSED),
  ({"normalizer": repeated(replace({"Regex": "."}, "aa"), 40)}, REFUSED),
  ({"normalizer": repeated(replace({"String": "a"}, "b"), 40)}, READ),
  ({"truncation": {"max_length": 1, "stride": 0, "strategy": "LongestFirst"}}, READ),
)


def test_no_small_tokenizer_takes_gigabytes(changed, tmp_path):
  paths = [
    changed(**fields).rename(tmp_path / f"{n}.json") for n, (fields, _) in enumerate(SMALL)
  ]
  done = subprocess.run(
    [sys.executable, "-c", IN_LITTLE_MEMORY, *paths],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=pathlib.Path(__file__).parents[2],
  )
  lines = done.stdout.splitlines()
  assert not done.returncode and len(lines) == len(SMALL), done.stderr[-400:]
  for line, (fields, told) in zip(lines, SMALL, strict=True):
    assert line.startswith(told), fields
