"""What a run's steps so far depend on, so that another run does not go on from them.

Learning rates and batches are pure functions of the step: they are recorded at a few steps and
compared at those that the run has made. A run that is only to become longer goes on where its
learning rate does not depend on the length.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from calm import storage
from calm.data import training_batches
from calm.training.updates import TrainConfig

FILE = "run.json"


@dataclasses.dataclass(frozen=True)
class Identity:
  """A run as its steps know it.

  Attributes:
    seed: of dropout and sampled layers.
    learning_rates: step -> learning rate.
    batches: step -> digest of its batch.
  """

  seed: int
  learning_rates: Mapping[int, float]
  batches: Mapping[int, str]


def of_run(config: TrainConfig, source: training_batches.Source) -> Identity:
  """The identity of a run, recorded at steps 0, 1, 2, 4, 8, ..."""
  steps = [s for s in _steps(config.num_steps.bit_length() + 1) if s < config.num_steps]
  schedule = config.schedule(config.num_steps)
  return Identity(
    seed=int(config.seed),
    learning_rates={step: float(np.asarray(schedule(step))) for step in steps},
    batches={step: _digest(source.batch(step)) for step in steps},
  )


def _steps(count: int) -> list[int]:
  """The first `count` steps at which a run is recorded, at least that before all others."""
  return [0, *(2**i for i in range(count - 1))]


def _digest(batch: training_batches.Batch) -> str:
  digest = hashlib.sha256()
  for name in sorted(batch):
    array = np.ascontiguousarray(batch[name])
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]


def check(path: pathlib.Path, identity: Identity, reached: int) -> None:
  """Compares a run with the one whose steps it goes on from; then it is the one recorded.

  Args:
    path: where the identity is kept.
    identity: of this run.
    reached: steps that were made.

  Raises:
    ValueError: steps were made under another learning rate or seed, or on other data.
  """
  differing = _differences(_read(path), identity, reached) if reached else []
  if differing:
    raise ValueError(
      f"Expected `output_dir` to be a new folder, or one of the same run, got"
      f" {str(path.parent)!r}, whose {reached} steps were made with {'; '.join(differing)};"
      " give another folder, or the configuration and data that it was started with."
    )
  stored = {
    "seed": identity.seed,
    "learning_rates": [
      [step, rate if math.isfinite(rate) else None]
      for step, rate in identity.learning_rates.items()
    ],
    "batches": [list(pair) for pair in identity.batches.items()],
  }
  storage.write_atomically(path, json.dumps(stored, indent=1) + "\n")


def _read(path: pathlib.Path) -> Identity | None:
  """What was recorded; None of runs of earlier versions."""
  if not path.exists():
    return None
  try:
    stored = storage.parse_json(storage.content(path))
    rates = {s: math.nan if r is None else float(r) for s, r in stored["learning_rates"]}
    batches = {s: str(d) for s, d in stored["batches"]}
    # Steps that are not there would not be compared.
    for steps in (rates, batches):
      if list(steps) != _steps(len(steps)) or any(type(s) is not int for s in steps):
        raise ValueError(f"Expected `steps` to be 0, 1, 2, 4, 8, ..., got {list(steps)[:8]}")
    if type(stored["seed"]) is not int:
      raise ValueError(f"Expected `seed` to be a whole number, got {stored['seed']!r}")
    return Identity(stored["seed"], rates, batches)
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f"Expected {str(path)!r} to say what a run was made with, got something else ({error});"
      " restore it, or take the folder away to begin anew."
    ) from error


def _differences(before: Identity | None, now: Identity, reached: int) -> list[str]:
  """What the steps that were made depend on and would be otherwise now, in words."""
  if before is None:
    return []
  found = []
  if before.seed != now.seed:
    found.append(f"seed {before.seed}, now {now.seed}")
  for step in sorted(set(before.learning_rates) & set(now.learning_rates)):
    old, new = before.learning_rates[step], now.learning_rates[step]
    if step < reached and not math.isclose(old, new, rel_tol=1e-4) and old == old:
      found.append(f"learning rate {old:g} at step {step}, now {new:g}")
      break
  steps = [s for s in set(before.batches) & set(now.batches) if s < reached]
  if any(before.batches[step] != now.batches[step] for step in steps):
    found.append("other data (or their seed, prefix, lengths or batch size)")
  return found
