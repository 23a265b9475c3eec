"""How many steps a budget has room for, from the seconds of one program on one batch.

The longest rows are timed, in the parts that a batch is computed in; other lengths take their
share of that, as the memory of their activations does.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from calm import training
from calm.data import training_batches
from calm.fitting import recipes
from calm.t5 import network
from calm.training import objectives

Bucket = tuple[int, int]
VALIDATIONS = 8
# Fewer steps teach nothing: a budget with room for less is refused.
LEAST_STEPS = 20
# Of the budget, at most, goes to validations; a row costs them this share of a step's.
_VALIDATING, _FORWARD = 0.2, 0.4


@dataclasses.dataclass(frozen=True)
class Timed:
  """One update of a part of a batch of the longest rows.

  Attributes:
    bucket: its lengths.
    rows: of the part.
    seconds: of its update.
    compiling: seconds that its program took to compile.
    spent: seconds that it took to find out.
  """

  bucket: Bucket
  rows: int
  seconds: float
  compiling: float
  spent: float


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a stage has time for.

  Attributes:
    num_steps: updates.
    num_validations: of the whole validation part.
    step_seconds: of an update, on average over lengths; NaN where nothing was timed.
    overhead: seconds of compiling.
  """

  num_steps: int
  num_validations: int = VALIDATIONS
  step_seconds: float = float("nan")
  overhead: float = 0.0


def measure(
  model: network.T5Config,
  params,
  objective: objectives.Objective,
  recipe: recipes.Recipe,
  bucket: Bucket,
  told: Callable[[str], None],
) -> Timed:
  """Times an update at learning rate 0.

  Args:
    model: sizes, with the recipe's dropout.
    params: the tree.
    objective: of the stage.
    recipe: of the stage.
    bucket: the longest lengths.
    told: what is being done.
  """
  begun = time.perf_counter()
  rows = recipe.batch_size // recipes.microbatches(model, bucket, recipe.batch_size)
  config = training.TrainConfig(
    num_steps=100,
    schedule=training.Schedule(peak=0.0, warmup_steps=1),
    optimizer=getattr(training, recipe.optimizer),
  )
  step = training.make_train_step(network.Transformer(model), config, objective, params)
  state = training.init_state(params, config, objective)
  batch = training_batches.pad_batch(
    [(np.ones(bucket[0], np.int32), np.ones(bucket[1], np.int32))] * rows,
    training_batches.Bucket(*bucket),
  )
  times = []
  for what in (f"compiling for {bucket[0]} tokens", "timing a step", "timing a step"):
    told(what)
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    times.append(time.perf_counter() - start)
  best = min(times[1:])
  return Timed(bucket, rows, best, times[0] - best, time.perf_counter() - begun)


def plan(
  timed: Timed,
  model: network.T5Config,
  buckets: Sequence[Bucket],
  recipe: recipes.Recipe,
  num_validation: int,
  budget: float,
) -> Plan:
  """Steps and validations in a budget; `LEAST_STEPS` and one validation where it is too small.

  Args:
    timed: an update.
    model: sizes.
    buckets: lengths of the steps to come, one a step.
    recipe: has the steps of a run without a budget; a budget makes at most ten times as many.
    num_validation: rows of a validation.
    budget: seconds, those that the timing took among them.
  """
  each, overhead, validation = _seconds(timed, model, buckets, recipe, num_validation)
  room = max(0.0, budget - timed.spent - overhead)
  most = int(np.clip(_VALIDATING * room / validation, 1, VALIDATIONS))
  least = min(LEAST_STEPS, recipe.num_steps)
  steps = int(np.clip((room - most * validation) / each, least, 10 * recipe.num_steps))
  return Plan(steps, min(most, steps), each, overhead)


def least_budget(
  timed: Timed,
  model: network.T5Config,
  buckets: Sequence[Bucket],
  recipe: recipes.Recipe,
  num_validation: int,
) -> float:
  """Seconds in which `plan` makes `LEAST_STEPS` steps, or the recipe's where it has fewer."""
  each, overhead, validation = _seconds(timed, model, buckets, recipe, num_validation)
  steps = min(LEAST_STEPS, recipe.num_steps)
  return timed.spent + overhead + validation + steps * each


def _seconds(timed, model, buckets, recipe, num_validation) -> tuple[float, float, float]:
  """Seconds of a step, on average over lengths, of compiling, and of a validation."""
  longest = recipes.row_bytes(model, timed.bucket)
  lengths = np.mean([recipes.row_bytes(model, bucket) for bucket in buckets]) / longest
  each = float(lengths) * timed.seconds * recipe.batch_size / timed.rows
  # One program a length, and one that validates.
  overhead = timed.compiling * (1 + len(set(buckets)))
  return each, overhead, _FORWARD * timed.seconds * num_validation / timed.rows
