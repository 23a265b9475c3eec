"""A small trainer on optax and Orbax, for those without T5X.

`fit` is the loop; it takes its batches and its objective as callables, saves through Orbax,
and resumes exactly: batch, dropout and learning rate of step s depend on (seed, s) alone.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from calm import arguments, signals, storage
from calm.data import training_batches
from calm.t5.config import Params
from calm.training import identities, objectives
from calm.training.saving import check_writable, checkpointer, restore, save
from calm.training.updates import TrainConfig, TrainState


@arguments.checked()
def read_history(path: pathlib.Path) -> list[dict[str, float]]:
  """The validations of a run, by step.

  Raises:
    ValueError: the file holds something else.
  """
  try:
    entries = json.loads(storage.content(path))  # NaN is a loss that it may well have
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(
      f"Expected {str(path)!r} to be the validations of a run, got no JSON ({error}); restore"
      " it, or take the folder away to begin anew."
    ) from error
  number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
  whole = isinstance(entries, list) and all(
    isinstance(entry, dict)
    and type(entry.get("step")) is int
    and all(map(number, entry.values()))
    for entry in entries
  )
  if not whole or any(a["step"] >= b["step"] for a, b in itertools.pairwise(entries)):
    raise ValueError(
      f"Expected {str(path)!r} to be a list of validations with numbers, their `step`s"
      f" ascending, got {entries!r:.100}; restore it, or take the folder away to begin anew."
    )
  return [{n: v if n == "step" else float(v) for n, v in entry.items()} for entry in entries]


class History:
  """Validations so far, for early stopping; kept in a JSON file beside the run."""

  @arguments.checked()
  def __init__(self, path: pathlib.Path, metric: str, patience: int | None):
    self._path, self._metric, self._patience = path, metric, patience
    self.entries: list[dict[str, float]] = []
    if path.exists():
      self.entries = read_history(path)

  def update(self, step: int, scalars: dict[str, float]) -> bool:
    """Records a validation; True where it is the best so far."""
    self.truncate(step - 1)
    self.entries.append({"step": step, **scalars})
    storage.write_atomically(self._path, json.dumps(self.entries, indent=1))
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
        f"Expected `stop_metric` to be one of {sorted(self.entries[-1])}, got {self._metric!r}."
      )
    return int(np.nanargmin(values if "loss" in self._metric else -values))


@dataclasses.dataclass
class Listener:
  """What the loop tells the outside world: a progress bar, TensorBoard, or nothing.

  Attributes:
    on_start: (step it starts from, steps in all).
    on_step: (step, training scalars), every `log_every` steps.
    on_eval: (step, validation scalars).
  """

  on_start: Callable[[int, int], None] = lambda step, num_steps: None
  on_step: Callable[[int, dict[str, float]], None] = lambda step, scalars: None
  on_eval: Callable[[int, dict[str, float]], None] = lambda step, scalars: None


@arguments.checked()
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
    ValueError: `output_dir` holds a run of another model, or one that has made steps under
      another learning rate or seed, or on other data.
  """
  listener = listener or Listener()
  check_writable(output_dir)
  identity = identities.of_run(config, source)
  with checkpointer(output_dir) as latest, checkpointer(output_dir, "best", 2) as bests:
    keeper = _Keeper(latest, bests, evaluate, config, output_dir, listener)
    state = keeper.resume(state)
    identities.check(output_dir / identities.FILE, identity, int(state.step))
    step, running = int(state.step), None
    listener.on_start(step, config.num_steps)
    while step < config.num_steps and not keeper.history.should_stop():
      signals.check()
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
        f"Expected a finite {which} loss, got {loss} by step {step}; lower the learning rate"
        f" (`training.Schedule.peak`) and run again: training resumes from the last checkpoint"
        f" in {self.output_dir}."
      )
