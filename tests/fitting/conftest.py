"""A toy that fits share; the files skip where what a fit needs is not
installed.
"""

import dataclasses
import functools
import io

import pytest
from rich import console

WORDS = ["a few words", "another text", "say it", "the fourth", "b"]
OPTIONS = {"tolerance": 0.5, "batch_size": 4, "metric": "chrf"}


@pytest.fixture(scope="module")
def rows():
  """90 rows with references, each of a source of its own."""
  from calm.calibrate import Prompt

  return [
    Prompt(f"r{i}", f"{WORDS[i % 5]} {i}", (WORDS[i % 3],), f"g{i}")
    for i in range(90)
  ]


class Said:
  """What a fit says: its sentences and the titles of its steps."""

  def __init__(self):
    self.console = console.Console(file=io.StringIO(), force_jupyter=False)

  @property
  def lines(self) -> list[str]:
    return self.console.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def promotion():
  import jax

  with jax.numpy_dtype_promotion("standard"):  # optax
    yield


@pytest.fixture(scope="module")
def few_rounds():
  """One candidate and few rounds: a toy's seconds are looked at for their form
  only.
  """
  from calm import inference
  from calm.fitting import choose

  patch = pytest.MonkeyPatch()
  for name, value in {"FIRST": (1, 1), "LAST": (2, 1), "FINALISTS": 1}.items():
    patch.setattr(choose, name, value)
  patch.setattr(inference.options, "measures", lambda predictor: ("softmax",))
  few = functools.partial(
    inference.timing.beside_full_depth, prompts=2, rounds=1
  )
  patch.setattr(inference.timing, "beside_full_depth", few)
  yield
  patch.undo()


@pytest.fixture(scope="module")
def always_faster(few_rounds):
  """Nothing is timed, and exits are taken to be faster: a toy's seconds are
  noise.
  """
  from calm import inference
  from calm.fitting import choose
  from calm.inference import timing

  patch = pytest.MonkeyPatch()
  seconds = timing.Seconds(timing.Pair(1, 2, 1.5, 1.0, 1.5, 1.5), None)
  gains = {"milliseconds": 1.0, "speedup": 1.5, "end_to_end": 1.5}

  def faster(predictor, prompts, tried, size, progress):
    return [dataclasses.replace(entry, **gains) for entry in tried], 1.5

  patch.setattr(
    inference.timing, "beside_full_depth", lambda *args, **more: seconds
  )
  patch.setattr(choose, "timed", faster)
  yield patch
  patch.undo()
