"""Seconds of both ways are measured on the same prompts; slower thresholds are told of."""

import dataclasses

import numpy as np
import pytest

from calm import calibrate, inference
from calm.calibrate import seconds as noted
from tests.inference import predictor_test

TEXTS = [f"text {i}" for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  return inference.load(directory, **{**predictor_test.OPTIONS, "batch_size": 2})


def test_prompts_are_timed_alone_and_in_whole_batches(model):
  told = []
  found = inference.timing.beside_full_depth(
    model, TEXTS, 0.6, prompts=3, rounds=1, progress=lambda share, text: told.append(share)
  )
  single, batched = found.single, found.batched
  assert (single.batch_size, single.num_prompts) == (1, 3)
  assert (batched.batch_size, batched.num_prompts) == (2, 6)
  for pair in (single, batched):
    assert pair.full > 0 and pair.speedup == pytest.approx(pair.full / pair.early)
    assert min(pair.speedup, 1) <= pair.end_to_end <= max(pair.speedup, 1)
  assert told == sorted(told) and told[-1] == 1.0


def test_there_are_no_batches_of_too_few_prompts(model):
  few = model.with_options(batch_size=4)
  assert inference.timing.beside_full_depth(few, TEXTS[:3], 0.6, rounds=1).batched is None


def test_a_threshold_that_is_not_faster_warns_wherever_it_is_served(model, tmp_path):
  made = calibrate.calibrate(np.zeros((200, 2)), [0.9, 0.3], tolerance=0.1, error_rate=0.05)
  made = dataclasses.replace(made, procedure=model.procedure)
  pair = noted.Pair(1, 8, full=1.0, early=1.25, speedup=0.8, end_to_end=0.9)
  noted.noted(made, noted.Seconds(pair)).save(tmp_path / "calibration.json")
  directory = predictor_test.save(tmp_path / "toy")
  with pytest.warns(inference.SlowerThanFullDepth, match=r"x0\.80 one at a time; decode at"):
    inference.load(directory, calibration=tmp_path / "calibration.json")
  faster = dataclasses.replace(pair, early=0.5, speedup=2.0)
  model.under(noted.noted(made, noted.Seconds(faster)))  # warns of nothing
