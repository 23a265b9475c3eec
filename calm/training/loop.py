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

from calm.calibrate.generations import files
from calm.data import training_batches
from calm.t5 import network
from calm.training import objectives

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


def adam(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Adam; for the exit classifier, whose zero start Adafactor's scaling would hold back."""
  return optax.adam(learning_rate)


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
  return _init(config, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def _init(config: network.T5Config, key: jax.Array) -> Params:
  tokens = jnp.ones((1, 2), jnp.int32)
  made = network.Transformer(config).init(key, tokens, tokens, tokens, enable_dropout=False)
  return made["params"]


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
  module: network.Transformer,
  config: TrainConfig,
  objective: objectives.Objective,
  params: Params,
) -> Callable[[TrainState, training_batches.Batch], tuple[TrainState, objectives.BatchMetrics]]:
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


class History:
  """Validations so far, for early stopping; kept in a JSON file beside the run."""

  def __init__(self, path: pathlib.Path, metric: str, patience: int | None):
    self._path, self._metric, self._patience = path, metric, patience
    self.entries: list[dict[str, float]] = []
    if path.exists():
      self.entries = json.loads(path.read_text())

  def update(self, step: int, scalars: dict[str, float]) -> bool:
    """Records a validation; True where it is the best so far."""
    self.truncate(step - 1)
    self.entries.append({"step": step, **scalars})
    files.write_atomically(self._path, json.dumps(self.entries, indent=1))
    return self._best_index() == len(self.entries) - 1

  def should_stop(self) -> bool:
    if self._patience is None or not self.entries:
      return False
    return len(self.entries) - 1 - self._best_index() >= self._patience

  def truncate(self, step: int) -> None:
    """Forgets validations after the step that a run resumes from."""
    self.entries = [entry for entry in self.entries if entry["step"] <= step]

  def _best_index(self) -> int:
    values = np.array([entry.get(self._metric, np.nan) for entry in self.entries])
    if np.isnan(values).all():
      raise ValueError(
        f"Expected `stop_metric` to be one of {sorted(self.entries[-1])}. Got {self._metric!r}."
      )
    return int(np.nanargmin(values if "loss" in self._metric else -values))


@dataclasses.dataclass
class Listener:
  """What the loop tells the outside world: a progress bar, TensorBoard, or nothing."""

  on_start: Callable[[int, int], None] = lambda step, num_steps: None
  on_step: Callable[[int, dict[str, float]], None] = lambda step, scalars: None
  on_eval: Callable[[int, dict[str, float]], None] = lambda step, scalars: None


def fit(
  state: TrainState,
  source: training_batches.Source,
  train_step: Callable[..., tuple[TrainState, objectives.BatchMetrics]],
  evaluate: Callable[[Params], dict[str, float]],
  config: TrainConfig,
  *,
  output_dir: pathlib.Path,
  listener: Listener | None = None,
) -> TrainState:
  """Trains to `config.num_steps`, resuming from the newest checkpoint in `output_dir`.

  Args:
    state: where a run without a checkpoint starts; donated, use what is returned.
    source: step -> batch.
    train_step: (state, batch) -> (state, metrics).
    evaluate: parameters -> validation scalars.
    config: the run.
    output_dir: checkpoints and `validation.json`; made if missing.
    listener: told of scalars.

  Returns:
    The state with the best validation scalar seen (the last one if none was measured).

  Raises:
    FloatingPointError: the loss is no longer finite; nothing of that is saved.
    PermissionError, NotADirectoryError: `output_dir` cannot be written.
    ValueError: `output_dir` holds a run of another model.
  """
  listener = listener or Listener()
  check_writable(output_dir)
  with checkpointer(output_dir) as latest, checkpointer(output_dir, "best", 2) as bests:
    keeper = _Keeper(latest, bests, evaluate, config, output_dir, listener)
    state = keeper.resume(state)
    step, running = int(state.step), None
    listener.on_start(step, config.num_steps)
    while step < config.num_steps and not keeper.history.should_stop():
      state, metrics = train_step(state, source.batch(step))
      step += 1
      running = metrics if running is None else running + metrics
      at_validation = step % config.eval_every == 0 or step == config.num_steps
      # A window never crosses a checkpoint: a resumed run reports the same windows.
      if step % config.log_every == 0 or at_validation:
        keeper.report(step, running.scalars())
        running = None
      if at_validation:
        keeper.validate_and_save(step, state)
    return keeper.best(state)


@dataclasses.dataclass
class _Keeper:
  """What a run writes: checkpoints (the newest and the best) and its validations."""

  latest: Any
  bests: Any
  evaluate: Callable[[Params], dict[str, float]]
  config: TrainConfig
  output_dir: pathlib.Path
  listener: Listener

  def __post_init__(self):
    path = self.output_dir / "validation.json"
    self.history = History(path, self.config.stop_metric, self.config.patience)

  def resume(self, state: TrainState) -> TrainState:
    step = self.latest.latest_step()
    if step is not None:
      state = restore(self.latest, step, state)
    reached = int(state.step)
    self.history.truncate(reached)
    # Killed between the best checkpoint and the newest: the best will be made again.
    for ahead in [step for step in self.bests.all_steps() if step > reached]:
      self.bests.delete(ahead)
    return state

  def report(self, step: int, scalars: dict[str, float]) -> None:
    self._check_finite("training", scalars, step)
    self.listener.on_step(step, scalars)

  def validate_and_save(self, step: int, state: TrainState) -> None:
    scalars = self.evaluate(state.params)
    self._check_finite("validation", scalars, step)
    self.listener.on_eval(step, scalars)
    if scalars and self.history.update(step, scalars):
      save(self.bests, step, {"params": state.params})
    save(self.latest, step, state)

  def best(self, state: TrainState) -> TrainState:
    step = self.bests.latest_step()
    if step is None:
      return state
    restored = restore(self.bests, step, {"params": state.params})
    return TrainState(state.step, restored["params"], state.opt_state)

  def _check_finite(self, which: str, scalars: dict[str, float], step: int) -> None:
    loss = scalars.get("loss", 0.0)
    if not np.isfinite(loss):
      raise FloatingPointError(
        f"Expected a finite {which} loss. Got {loss} by step {step}; lower the learning rate"
        f" (`training.Schedule.peak`) and run again: training resumes from the last checkpoint"
        f" in {self.output_dir}."
      )


def check_writable(output_dir: pathlib.Path) -> None:
  """Makes the folder, and refuses one that nothing can be written to before hours are spent.

  Raises:
    OSError: says which folder, and what to do.
  """
  try:
    output_dir.mkdir(parents=True, exist_ok=True)
    with files.temporary(output_dir / "writable"):
      pass
  except OSError as error:
    raise type(error)(
      f"Expected `output_dir` to be a folder that can be written. Got {str(output_dir)!r}"
      f" ({error.strerror}); choose another or change its permissions."
    ) from error


def checkpointer(output_dir: pathlib.Path, name: str = "checkpoints", max_to_keep: int = 1):
  """An Orbax manager of one folder of the run; checkpoints appear whole or not at all."""
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(
    max_to_keep=max_to_keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
  )
  return ocp.CheckpointManager(
    (output_dir / name).absolute(),
    options=options,
    item_handlers=ocp.StandardCheckpointHandler(),
  )


def save(manager, step: int, tree: Any) -> None:
  import orbax.checkpoint as ocp

  manager.save(step, args=ocp.args.StandardSave(tree), force=True)
  manager.wait_until_finished()


def restore(manager, step: int, like: Any) -> Any:
  """The checkpoint of a step, with the structure and shapes of `like`.

  Raises:
    ValueError: it holds another structure or other shapes.
  """
  import orbax.checkpoint as ocp

  # Orbax reads all leaves at once, and leaves the other reads behind at the first misfit.
  stored, expected = _shapes(manager.item_metadata(step)), _shapes(like)
  misfits = [path for path in expected if stored.get(path) != expected[path]]
  if misfits:
    path = misfits[0]
    raise ValueError(
      f"Expected {str(manager.directory)!r} to hold a run of this model and optimizer, with"
      f" {path!r} of shape {expected[path]}. Got {stored.get(path, 'none')} at step {step};"
      " give another `output_dir`, or the configuration that it was started with."
    )
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{path: shape} of a tree or of Orbax's description of one."""
  leaves, _ = jax.tree.flatten_with_path(getattr(tree, "tree", tree))
  named = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {named(path): tuple(leaf.shape) for path, leaf in leaves}
