"""The script that trains a vocabulary."""

import json
import pathlib
import subprocess
import sys

from calm.data import vocabulary
from tests import toy_vocabulary

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "train_vocabulary.py"


def test_a_trained_vocabulary_has_t5s_special_ids_and_is_reproducible(tmp_path):
  rows = tmp_path / "rows.jsonl"
  made = []
  texts = enumerate(sorted(set(toy_vocabulary.TEXTS)))
  lines = [
    {"id": str(n), "input": text, "target": [text[:9]]} for n, text in texts
  ]
  rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
  for path in (tmp_path / "a.model", tmp_path / "b.model"):
    command = [
      sys.executable,
      str(SCRIPT),
      f"--output={path}",
      "--size=40",
      str(rows),
    ]
    subprocess.run(command, check=True, timeout=300)
    made.append(vocabulary.SentencePieceVocabulary(path, extra_ids=0))
  assert made[0].vocab_size == 40
  assert (made[0].pad_id, made[0].eos_id, made[0].unk_id) == (0, 1, 2)
  text = "the lazy dog"
  assert made[0].decode(made[0].encode(text)) == text
  assert made[0].encode(text) == made[1].encode(text)
