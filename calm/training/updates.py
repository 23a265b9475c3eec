"""What one step of training does: state, optimizers, the compiled update and
evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from calm import arguments
from calm.data import training_batches
from calm.t5 import limits, network
from calm.t5.network import Params
from calm.training import objectives

_MOST_STEPS = 2**31 - 1


@struct.dataclass
class TrainState:
  """Everything a resumed run needs."""

  step: jax.Array  # updates made so far, []
  params: Params
  opt_state: Any


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Schedule:
  """Linear warm-up, then cosine decay to `num_steps`."""

  peak: float = 3e-2  # learning rate at the end of the warm-up
  warmup_steps: int = 100  # steps from 0 to `peak`
  final_fraction: float = 0.05  # of `peak`, at the last step

  def __post_init__(self):
    limits.whole(
      "warmup_steps", self.warmup_steps, 0, _MOST_STEPS, "give steps"
    )
    for name in ("peak", "final_fraction"):
      if not 0 <= (value := getattr(self, name)) <= 1000:
        raise ValueError(
          f"Expected `{name}` to be a number in [0, 1000], got {value!r}; T5 "
          "has 0.01 to 0.001."
        )

  def __call__(self, num_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=self.peak,
      warmup_steps=min(self.warmup_steps, max(num_steps - 1, 0)),
      decay_steps=max(num_steps, 1),
      end_value=self.peak * self.final_fraction,
    )


def adafactor(
  learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
  """Adafactor with T5's settings: updates scaled by the parameter, no
  momentum.
  """
  return optax.adafactor(learning_rate, multiply_by_parameter_scale=True)


# For the exit classifier, whose zero start Adafactor's scaling would hold back.
adam = optax.adam


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One run."""

  num_steps: int  # updates in all, also of a resumed run
  # num_steps -> learning rate
  schedule: Callable[[int], optax.Schedule] = Schedule()
  # Learning-rate schedule -> optax transformation.
  optimizer: Callable[..., optax.GradientTransformation] = adafactor
  seed: int = 0  # of initialisation, dropout and sampled layers
  # steps between validations (a checkpoint is written with each)
  eval_every: int = 200
  log_every: int = 20  # steps between scalars
  # Validation scalar watched for early stopping (lower is better for names that
  # hold 'loss', higher for others).
  stop_metric: str = "loss"
  # validations without improvement before the run stops
  patience: int | None = None
  # Parts that a batch is computed in, one after the other, so that long rows
  # fit the memory; the gradient is that of the whole batch.
  num_microbatches: int = 1
  # after which a run, or a resumed one, validates and stops
  seconds: float | None = None

  def __post_init__(self):
    for name in (
      "num_steps",
      "eval_every",
      "log_every",
      "num_microbatches",
      "patience",
    ):
      if (value := getattr(self, name)) is not None:
        limits.whole(name, value, 1, _MOST_STEPS, "give a number in that range")
    if self.seconds is not None and not self.seconds > 0:
      raise ValueError(
        f"Expected `seconds` above 0, got {self.seconds}; None is no limit."
      )


def init_params(config: network.T5Config, seed: int) -> Params:
  """Fresh parameters of a model."""
  tokens = jnp.ones((1, 2), jnp.int32)
  module = network.Transformer(config)
  init = jax.jit(
    lambda key: module.init(key, *[tokens] * 3, enable_dropout=False)["params"]
  )
  return init(jax.random.key(seed))


def _optimizer(
  config: TrainConfig,
  objective: objectives.Objective,
  params: Mapping[str, Any],
) -> optax.GradientTransformation:
  """The optimizer over what the objective trains; everything else never
  changes.
  """
  transform = config.optimizer(config.schedule(config.num_steps))
  labels = traverse_util.path_aware_map(
    lambda path, _: (
      "train" if objective.trains(tuple(map(str, path))) else "freeze"
    ),
    dict(params),
  )
  return optax.partition(
    {"train": transform, "freeze": optax.set_to_zero()}, labels
  )


def init_state(
  params: Mapping[str, Any],
  config: TrainConfig,
  objective: objectives.Objective,
) -> TrainState:
  """Step 0 of a run from `params`."""
  optimizer = _optimizer(config, objective, params)
  return TrainState(jnp.array(0, jnp.int32), params, optimizer.init(params))


def make_train_step(
  module: network.Transformer,
  config: TrainConfig,
  objective: objectives.Objective,
  params: Mapping[str, Any],
) -> Callable[
  [TrainState, training_batches.Batch],
  tuple[TrainState, objectives.BatchMetrics],
]:
  """The jitted update, (state, batch) -> (state, sums over the batch's real
  tokens), by the gradient of the mean loss over them; `params` is a tree of the
  model's structure, the state is donated.
  """
  optimizer = _optimizer(config, objective, params)

  @functools.partial(jax.jit, donate_argnums=(0,))
  def train_step(state, batch):
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    weight = jnp.maximum(jnp.sum(batch["decoder_loss_weights"]), 1.0)

    def gradient(part, rng):
      def mean_loss(params):
        loss, metrics = objective.loss(module, params, part, rng)
        return loss / weight, metrics

      return jax.grad(mean_loss, has_aux=True)(state.params)

    grads, metrics = _in_parts(gradient, batch, rng, config.num_microbatches)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def _in_parts(
  gradient, batch: training_batches.Batch, rng: jax.Array, count: int
):
  """The sum of (gradients, metrics) over `count` parts of a batch, each with
  its own draws.
  """
  if count == 1:
    return gradient(batch, rng)
  rows = len(batch["decoder_loss_weights"])
  if rows % count:
    raise ValueError(
      f"Expected `num_microbatches` to divide the {rows} rows of a batch, "
      f"got {count}; choose"
      " another number, or another `batch_size`."
    )
  parts = jax.tree.map(
    lambda x: x.reshape(count, rows // count, *x.shape[1:]), batch
  )

  def add(number, total):
    part = jax.tree.map(lambda x: x[number], parts)
    return jax.tree.map(
      jnp.add, total, gradient(part, jax.random.fold_in(rng, number))
    )

  first = jax.tree.map(lambda x: x[0], parts)
  # shapes: nothing computes it
  nothing = jax.tree.map(jnp.zeros_like, gradient(first, rng))
  return jax.lax.fori_loop(0, count, add, nothing)
