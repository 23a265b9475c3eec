"""A run goes on from its own steps only."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")

from calm import training
from calm.data import training_batches
from calm.training import loop

CONSTANT = training.Schedule(peak=0.01, warmup_steps=1, final_fraction=1.0)
CONFIG = training.TrainConfig(num_steps=20, schedule=CONSTANT)


def source(seed=0, first=3):
  sequences = training_batches.Ragged([[first, n, 1] for n in range(3, 20)])
  return training_batches.Supervised(
    sequences, sequences, (training_batches.Bucket(4, 4),), 4, seed
  )


@pytest.mark.parametrize(
  ("change", "rows", "words"),
  [
    ({"seed": 7}, {}, "seed 0, now 7"),
    ({"schedule": training.Schedule(0.02, 1, 1.0)}, {}, r"learning rate 0\.01 at step"),
    # A longer run decays more slowly: the steps that were made had other rates.
    ({"schedule": training.Schedule(0.01, 1), "num_steps": 40}, {}, "learning rate"),
    ({}, {"first": 4}, "other data"),
    ({}, {"seed": 1}, "other data"),
  ],
)
def test_another_rate_seed_or_data_is_refused(tmp_path, change, rows, words):
  path = tmp_path / "run.json"
  loop.check_identity(path, loop.identity_of(CONFIG, source()), 0)
  before = path.read_text()
  other = loop.identity_of(dataclasses.replace(CONFIG, **change), source(**rows))
  with pytest.raises(ValueError, match=words):
    loop.check_identity(path, other, 10)
  assert path.read_text() == before
  loop.check_identity(path, other, 0)  # nothing was made yet: it begins


def test_the_same_run_and_a_longer_one_at_a_constant_rate_go_on(tmp_path):
  path = tmp_path / "run.json"
  for config in (CONFIG, CONFIG, dataclasses.replace(CONFIG, num_steps=64)):
    loop.check_identity(path, loop.identity_of(config, source()), 10)
  path.unlink()  # a run of an earlier version
  loop.check_identity(path, loop.identity_of(CONFIG, source(seed=3)), 10)
  path.write_text("{}")
  with pytest.raises(ValueError, match="to say what a run was made with"):
    loop.check_identity(path, loop.identity_of(CONFIG, source()), 10)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_steps", -3),
    ("num_steps", 0),
    ("patience", -1),
    ("eval_every", 0),
    ("log_every", 2.5),
  ],
)
def test_numbers_without_meaning_are_refused(name, value):
  with pytest.raises(ValueError, match=f"`{name}`"):
    training.TrainConfig(**{"num_steps": 3, name: value})
  assert training.TrainConfig(num_steps=np.int64(3), patience=1).patience == 1
