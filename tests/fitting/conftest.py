"""A toy that fits share; the files skip where what a fit needs is not installed."""

import dataclasses
import functools

import pytest

WORDS = ["a few words", "another text", "say it", "the fourth", "b"]
OPTIONS = {"tolerance": 0.5, "batch_size": 4, "metric": "chrf"}


@pytest.fixture(scope="module")
def rows():
  """90 rows with references, each of a source of its own."""
  from calm.calibrate import Prompt

  return [Prompt(f"r{i}", f"{WORDS[i % 5]} {i}", (WORDS[i % 3],), f"g{i}") for i in range(90)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A toy's folder."""
  from tests.inference import predictor_test

  return predictor_test.save(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def model(directory):
  """The toy, opened."""
  from calm import inference
  from tests.inference import predictor_test

  return inference.load(directory, **predictor_test.OPTIONS)


@pytest.fixture(scope="module")
def promotion():
  import jax

  with jax.numpy_dtype_promotion("standard"):  # optax
    yield


@pytest.fixture(scope="module")
def few_rounds():
  """One candidate and few rounds: a toy's seconds are looked at for their form only."""
  from calm import inference
  from calm.fitting import choose

  patch = pytest.MonkeyPatch()
  for name, value in {"FIRST": (1, 1), "LAST": (2, 1), "FINALISTS": 1}.items():
    patch.setattr(choose, name, value)
  patch.setattr(choose, "measures", lambda predictor: ("softmax",))
  few = functools.partial(inference.timing.beside_full_depth, prompts=2, rounds=1)
  patch.setattr(inference.timing, "beside_full_depth", few)
  yield
  patch.undo()


@pytest.fixture(scope="module")
def always_faster(few_rounds):
  """Whatever was measured, exits are taken to be faster: a toy's seconds are noise."""
  from calm import inference
  from calm.fitting import choose

  patch = pytest.MonkeyPatch()
  measured, timed = inference.timing.beside_full_depth, choose.timed

  def measure(*arguments, **options):
    found = measured(*arguments, **options)
    single = dataclasses.replace(found.single, speedup=1.5)
    return dataclasses.replace(found, single=single, batched=None)

  def faster(*arguments):
    found, full = timed(*arguments)
    made = [dataclasses.replace(entry, speedup=1.5, end_to_end=1.5) for entry in found]
    return made, full

  patch.setattr(inference.timing, "beside_full_depth", measure)
  patch.setattr(choose, "timed", faster)
  yield patch
  patch.undo()
