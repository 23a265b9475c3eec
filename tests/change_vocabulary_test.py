"""The scripts that train a vocabulary and give a checkpoint another one."""

import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from calm import checkpoints, network, parameters, training, vocabulary
from tests import toy_vocabulary

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


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


@pytest.mark.parametrize("tied", [True, False])
def test_shared_pieces_keep_their_rows_and_others_are_spelt(tmp_path, tied):
  old = vocabulary.SentencePieceVocabulary(toy_vocabulary.train(tmp_path / "old.model"), 4)
  small = toy_vocabulary.train(tmp_path / "new.model", model_type="char")
  config = network.T5Config(
    vocab_size=64,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
    mlp_dim=8,
    logits_via_embedding=tied,
    exit_classifier=True,
  )
  params = training.init_params(config, 0)
  checkpoints.save(tmp_path / "model", params, config, vocabulary=old)
  result = run(
    "change_vocabulary.py",
    f"--model={tmp_path / 'model'}",
    f"--vocabulary={small}",
    "--vocab_size=56",
    "--extra_ids=4",
    f"--output={tmp_path / 'changed'}",
  )
  assert result.returncode == 0, result.stderr
  made = checkpoints.load(tmp_path / "changed")
  new = made.vocabulary
  assert new is not None and made.config.vocab_size == 56
  parameters.check(made.params, made.config)
  before, after = parameters.flatten(params), parameters.flatten(made.params)
  pieces = {old.piece(i): i for i in range(old.vocab_size)}
  tables = [("token_embedder/embedding", lambda x: x)]
  if not tied:
    tables.append(("decoder/logits_dense/kernel", lambda x: x.T))
  for path, as_rows in tables:
    old_rows, new_rows = as_rows(np.asarray(before[path])), as_rows(np.asarray(after[path]))
    shared = [i for i in range(new.vocab_size) if new.piece(i) in pieces]
    assert len(shared) > 10
    for i in shared:
      np.testing.assert_array_equal(new_rows[i], old_rows[pieces[new.piece(i)]])
    for i in set(range(new.vocab_size)) - set(shared):
      spelt = old_rows[list(old.encode(new.piece(i)))].mean(axis=0)
      np.testing.assert_allclose(new_rows[i], spelt, rtol=1e-6)
  untouched = "encoder/encoder_norm/scale"
  np.testing.assert_array_equal(before[untouched], after[untouched])


def test_a_vocabulary_larger_than_the_rows_is_refused(tmp_path):
  path = toy_vocabulary.train(tmp_path / "new.model")
  result = run(
    "change_vocabulary.py",
    *("--model=packed", f"--vocabulary={path}", "--vocab_size=20"),
    f"--output={tmp_path / 'changed'}",
  )
  assert result.returncode != 0
  assert "at most 20" in result.stderr
  assert not (tmp_path / "changed").exists()
