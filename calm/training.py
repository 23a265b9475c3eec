"""A small trainer on optax and Orbax, for those without T5X.

`fit` is the loop; it takes its batches and its objective as callables, saves through Orbax,
and resumes exactly: batch, dropout and learning rate of step s depend on (seed, s) alone.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util

from calm import batches, network, objectives

Params = Any


@struct.dataclass
class TrainState:
  """Everything a resumed run needs.

  Attributes:
    step: updates made so far, [].
    params: the parameter tree.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  params: Params
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Linear warm-up to `peak`, then cosine decay to `peak * final_fraction` at `num_steps`."""

  peak: float = 3e-2
  warmup_steps: int = 100
  final_fraction: float = 0.05

  def __call__(self, num_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=self.peak,
      warmup_steps=min(self.warmup_steps, max(num_steps - 1, 0)),
      decay_steps=max(num_steps, 1),
      end_value=self.peak * self.final_fraction,
    )


def adafactor(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Adafactor with T5's settings: updates scaled by the parameter, no momentum."""
  return optax.adafactor(learning_rate, multiply_by_parameter_scale=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One run.

  Attributes:
    num_steps: updates in all, also of a resumed run.
    schedule: learning rate.
    optimizer: learning-rate schedule -> optax transformation.
    seed: seeds initialisation, dropout and sampled layers.
    eval_every: steps between validations (a checkpoint is written with each).
    log_every: steps between TensorBoard scalars.
    stop_metric: validation scalar watched for early stopping (lower is better for names
      that begin with 'loss', higher for others).
    patience: validations without improvement before the run stops; None never stops.
  """

  num_steps: int
  schedule: Callable[[int], optax.Schedule] = Schedule()
  optimizer: Callable[..., optax.GradientTransformation] = adafactor
  seed: int = 0
  eval_every: int = 200
  log_every: int = 20
  stop_metric: str = "loss"
  patience: int | None = None


def init_params(config: network.T5Config, seed: int) -> Params:
  """Fresh parameters of a model."""
  tokens = jnp.ones((1, 2), jnp.int32)
  module = network.Transformer(config)
  init = lambda key: module.init(key, tokens, tokens, tokens, enable_dropout=False)["params"]
  return jax.jit(init)(jax.random.key(seed))


def make_optimizer(
  config: TrainConfig, objective: objectives.Objective, params: Params
) -> optax.GradientTransformation:
  """The optimizer over what the objective trains; everything else never changes."""
  transform = config.optimizer(config.schedule(config.num_steps))
  paths = traverse_util.flatten_dict(params)
  labels = traverse_util.unflatten_dict(
    {path: "train" if objective.trains(path) else "freeze" for path in paths}
  )
  return optax.partition({"train": transform, "freeze": optax.set_to_zero()}, labels)


def init_state(
  params: Params, config: TrainConfig, objective: objectives.Objective
) -> TrainState:
  """Step 0 of a run that starts from these parameters."""
  optimizer = make_optimizer(config, objective, params)
  return TrainState(jnp.array(0, jnp.int32), params, optimizer.init(params))


def make_train_step(
  module: network.Transformer, config: TrainConfig, objective: objectives.Objective, params: Params
) -> Callable[[TrainState, batches.Batch], tuple[TrainState, objectives.BatchMetrics]]:
  """The jitted update; the gradient is that of the mean loss over real tokens."""
  optimizer = make_optimizer(config, objective, params)

  @functools.partial(jax.jit, donate_argnums=(0,))
  def train_step(state, batch):
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def mean_loss(params):
      loss, metrics = objective.loss(module, params, batch, rng)
      return loss / jnp.maximum(metrics.weight, 1.0), metrics

    grads, metrics = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def make_eval_fn(
  module: network.Transformer, objective: objectives.Objective, eval_batches: Sequence[Any]
) -> Callable[[Params], dict[str, float]]:
  """Validation scalars of a parameter tree, without dropout and over every layer."""
  one = jax.jit(lambda params, batch: objective.loss(module, params, batch, None)[1])

  def evaluate(params):
    total = None
    for batch in eval_batches:
      metrics = one(params, batch)
      total = metrics if total is None else total + metrics
    return {} if total is None else total.scalars()

  return evaluate


class BestSoFar:
  """Early stopping on a validation scalar; its history lives in a JSON file beside the run."""

  def __init__(self, path: pathlib.Path, metric: str, patience: int | None):
    self._path, self._metric, self._patience = path, metric, patience
    self.history: list[dict[str, float]] = []
    if path.exists():
      self.history = json.loads(path.read_text())

  def update(self, step: int, scalars: dict[str, float]) -> bool:
    """Records a validation; True where it is the best so far."""
    self.history = [entry for entry in self.history if entry["step"] < step]
    self.history.append({"step": step, **scalars})
    write_text(self._path, json.dumps(self.history, indent=1))
    return self._best_index() == len(self.history) - 1

  def should_stop(self) -> bool:
    if self._patience is None or not self.history:
      return False
    return len(self.history) - 1 - self._best_index() >= self._patience

  def truncate(self, step: int) -> None:
    """Forgets validations after the step that a run resumes from."""
    self.history = [entry for entry in self.history if entry["step"] <= step]

  def _best_index(self) -> int:
    values = np.array([entry.get(self._metric, np.nan) for entry in self.history])
    if np.isnan(values).all():
      raise ValueError(
        f"Expected `stop_metric` to be one of {sorted(self.history[-1])}. Got"
        f" {self._metric!r}."
      )
    return int(np.nanargmin(values if self._metric.startswith("loss") else -values))


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes to a temporary name and renames, so that a kill leaves the old file or the new."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text)
  partial.replace(path)


@dataclasses.dataclass
class Listener:
  """What the loop tells the outside world: a progress bar, TensorBoard, or nothing."""

  on_step: Callable[[int, dict[str, float]], None] = lambda step, scalars: None
  on_eval: Callable[[int, dict[str, float]], None] = lambda step, scalars: None


def fit(
  state: TrainState,
  source: batches.Source,
  train_step: Callable[..., tuple[TrainState, objectives.BatchMetrics]],
  evaluate: Callable[[Params], dict[str, float]],
  config: TrainConfig,
  *,
  output_dir: pathlib.Path,
  listener: Listener | None = None,
) -> TrainState:
  """Trains to `config.num_steps`, resuming from the newest checkpoint in `output_dir`.

  Args:
    state: where a run without a checkpoint starts.
    source: step -> batch.
    train_step: (state, batch) -> (state, metrics).
    evaluate: parameters -> validation scalars.
    config: the run.
    output_dir: checkpoints and `validation.json`; made if missing.
    listener: told of scalars.

  Returns:
    The state with the best validation scalar seen (the last one if none was measured).
  """
  listener = listener or Listener()
  output_dir.mkdir(parents=True, exist_ok=True)
  best = BestSoFar(output_dir / "validation.json", config.stop_metric, config.patience)
  with checkpointer(output_dir) as latest, checkpointer(output_dir, "best") as bests:
    state = restore_latest(latest, state)
    best.truncate(int(state.step))
    running, seen = None, int(state.step)
    while int(state.step) < config.num_steps and not best.should_stop():
      state, metrics = train_step(state, source.batch(seen))
      seen += 1
      running = metrics if running is None else running + metrics
      if seen % config.log_every == 0 or seen == config.num_steps:
        scalars = running.scalars()
        _check_finite(scalars["loss"], seen, output_dir)
        listener.on_step(seen, scalars)
        running = None
      if seen % config.eval_every == 0 or seen == config.num_steps:
        scalars = evaluate(state.params)
        listener.on_eval(seen, scalars)
        if scalars and best.update(seen, scalars):
          save(bests, seen, {"params": state.params})
        save(latest, seen, state)
    step = bests.latest_step()
    if step is None:
      return state
    restored = restore(bests, step, {"params": state.params})
    return state.replace(params=restored["params"])


def _check_finite(loss: float, step: int, output_dir: pathlib.Path) -> None:
  if not np.isfinite(loss):
    raise FloatingPointError(
      f"Expected a finite training loss. Got {loss} by step {step}; lower the learning rate"
      f" and run again: training resumes from the last checkpoint in {output_dir}."
    )


def checkpointer(output_dir: pathlib.Path, name: str = "checkpoints"):
  """An Orbax manager that keeps the newest checkpoint (the best one, for name 'best')."""
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
  return ocp.CheckpointManager((output_dir / name).absolute(), options=options)


def save(manager, step: int, tree: Any) -> None:
  import orbax.checkpoint as ocp

  manager.save(step, args=ocp.args.StandardSave(tree), force=True)
  manager.wait_until_finished()


def restore(manager, step: int, like: Any) -> Any:
  """The checkpoint of a step, with the structure and shapes of `like`."""
  import orbax.checkpoint as ocp

  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def restore_latest(manager, state: TrainState) -> TrainState:
  step = manager.latest_step()
  return state if step is None else restore(manager, step, state)
