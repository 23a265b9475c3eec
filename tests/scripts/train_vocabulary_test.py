"""The script that trains a vocabulary."""

import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from calm.data import vocabulary
from tests import toy_vocabulary

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def run(name, *arguments):
  command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "train.jsonl.gz"
  with gzip.open(path, "wt", encoding="utf-8") as file:
    for number, text in enumerate(sorted(set(toy_vocabulary.TEXTS))):
      file.write(json.dumps({"id": str(number), "input": text, "target": [text[:9]]}) + "\n")
  return path


def test_a_trained_vocabulary_has_t5s_special_ids_and_is_reproducible(rows_file, tmp_path):
  paths = [tmp_path / "a.model", tmp_path / "b.model"]
  for path in paths:
    result = run("train_vocabulary.py", f"--output={path}", "--size=40", rows_file)
    assert result.returncode == 0, result.stderr
  made = [vocabulary.SentencePieceVocabulary(path, extra_ids=0) for path in paths]
  assert made[0].vocab_size == 40
  assert (made[0].pad_id, made[0].eos_id, made[0].unk_id) == (0, 1, 2)
  text = "the lazy dog"
  assert made[0].decode(made[0].encode(text)) == text
  assert [m.encode(text) for m in made] == [made[0].encode(text)] * 2
