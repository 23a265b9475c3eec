"""A small trainer on optax and Orbax, for those without T5X.

`fit` is the loop; it takes its batches and its objective as callables, saves
through Orbax, and resumes exactly: batch, dropout and learning rate of step s
depend on (seed, s) alone.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from calm import arguments, storage
from calm.data import training_batches
from calm.t5.network import Params
from calm.training import objectives
from calm.training.updates import TrainConfig, TrainState

_ANEW = "restore it, or take the folder away to begin anew"


@arguments.checked()
def read_history(path: pathlib.Path) -> list[dict[str, float]]:
  """The validations of a run, by step.

  Raises:
    ValueError: the file holds something else.
  """
  with storage.reading(path, "a list of validations with numbers", _ANEW):
    # NaN is a loss that it may well have
    entries = json.loads(
      storage.content(path), object_pairs_hook=storage.unique_keys
    )
    return [
      {"step": int(entry["step"])}
      | {n: float(v) for n, v in entry.items() if n != "step"}
      for entry in entries
    ]


def since_best(history: list[dict[str, float]], metric: str) -> int:
  """Validations after the best one, whose loss is lowest, or whose other metric
  is highest.
  """
  values = np.array([entry.get(metric, np.nan) for entry in history])
  if np.isnan(values).all():
    raise ValueError(
      f"Expected `stop_metric` to be one of {sorted(history[-1])}, got "
      f"{metric!r}; watch one of"
      " these."
    )
  best = np.nanargmin(values if "loss" in metric else -values)
  return len(values) - 1 - int(best)


@dataclasses.dataclass
class Listener:
  """What the loop tells the outside world: a progress bar, a file, or
  nothing.
  """

  # (step it starts from, steps in all).
  on_start: Callable[[int, int], None] = lambda step, num_steps: None
  # (step, training scalars), every `log_every` steps.
  on_step: Callable[[int, dict[str, float]], None] = lambda step, scalars: None
  # (step, validation scalars).
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
  """Trains from `state`, which is donated, to `config.num_steps`, resuming from
  the newest checkpoint in `output_dir`; returns the state with the best
  validation scalar (the last one if none was measured).

  `train_step` is (state, batch) -> (state, metrics), `evaluate` parameters ->
  validation scalars. FloatingPointError: the loss is no longer finite, and
  nothing of that is saved; ValueError: `output_dir` holds another run: model,
  learning rate, seed or data.
  """
  listener = listener or Listener()
  validations = output_dir / "validation.json"
  newest = _checkpointer(output_dir, "checkpoints", 1)
  with newest as newest, _checkpointer(output_dir, "best", 2) as bests:
    step = newest.latest_step() or 0
    running = None
    # Orbax reads all leaves at once, and leaves the other reads behind at the
    # first misfit.
    check_identity(output_dir / "run.json", config, source, state, step)
    if step:
      state = _restore(newest, step, state)
    history = read_history(validations) if validations.exists() else []
    history = [entry for entry in history if entry["step"] <= step]
    # Killed between the best checkpoint and the newest: the best will be made
    # again.
    for ahead in [saved for saved in bests.all_steps() if saved > step]:
      bests.delete(ahead)
    listener.on_start(step, config.num_steps)
    begun = time.monotonic()
    late = False
    while step < config.num_steps and not late:
      patience = config.patience if history else None
      if (
        patience is not None
        and since_best(history, config.stop_metric) >= patience
      ):
        break
      state, metrics = train_step(state, source.batch(step))
      step += 1
      running = metrics if running is None else running + metrics
      late = (
        config.seconds is not None and time.monotonic() - begun > config.seconds
      )
      at_validation = (
        step % config.eval_every == 0 or step == config.num_steps or late
      )
      # A window never crosses a checkpoint: a resumed run reports the same
      # windows.
      if step % config.log_every == 0 or at_validation:
        listener.on_step(
          step, _finite("training", running.scalars(), step, output_dir)
        )
        running = None
      if at_validation:
        scalars = _finite(
          "validation", evaluate(state.params), step, output_dir
        )
        listener.on_eval(step, scalars)
        if scalars:
          history.append({"step": step, **scalars})
          storage.write_atomically(validations, json.dumps(history, indent=1))
          if since_best(history, config.stop_metric) == 0:
            _save(bests, step, {"params": state.params})
        _save(newest, step, state)
    if (best := bests.latest_step()) is None:
      return state
    restored = _restore(bests, best, {"params": state.params})
    return dataclasses.replace(state, params=restored["params"])


def _finite(
  which: str, scalars, step: int, output_dir: pathlib.Path
) -> dict[str, float]:
  loss = scalars.get("loss", 0.0)
  if not np.isfinite(loss):
    raise FloatingPointError(
      f"Expected a finite {which} loss, got {loss} by step {step}; lower the "
      "learning rate"
      " (`training.Schedule.peak`) and run again: training resumes from the "
      "last checkpoint"
      f" in {output_dir}."
    )
  return scalars


def check_writable(output_dir: pathlib.Path) -> None:
  """Makes the folder; OSError, before hours are spent, where nothing can be
  written to it.
  """
  try:
    output_dir.mkdir(parents=True, exist_ok=True)
    with storage.temporary(output_dir / "writable"):
      pass
  except OSError as error:
    raise type(error)(
      "Expected `output_dir` to be a folder that can be written, got "
      f"{str(output_dir)!r}"
      f" ({error.strerror}); choose another or change its permissions."
    ) from error


def _checkpointer(output_dir: pathlib.Path, name: str, max_to_keep: int):
  """An Orbax manager of one folder of the run; checkpoints appear whole or not
  at all.
  """
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(
    max_to_keep=max_to_keep,
    enable_async_checkpointing=False,
    cleanup_tmp_directories=True,
  )
  folder = (output_dir / name).absolute()
  handler = ocp.StandardCheckpointHandler()
  return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def _save(manager, step: int, tree: Any) -> None:
  import orbax.checkpoint as ocp

  manager.save(step, args=ocp.args.StandardSave(tree), force=True)


def _restore(manager, step: int, like: Any) -> Any:
  """The checkpoint of a step, with the structure and shapes of `like`."""
  import orbax.checkpoint as ocp

  return manager.restore(step, args=ocp.args.StandardRestore(like))


def check_identity(
  path: pathlib.Path,
  config: TrainConfig,
  source: training_batches.Source,
  state: TrainState,
  reached: int,
) -> None:
  """Compares a run with the one whose `reached` steps it goes on from, and
  records it: seed, shapes, and the learning rates and batches at steps 0, 1, 2,
  4, 8, ...

  A run that is only to become longer goes on where its learning rate does not
  depend on the length. ValueError where those steps were made otherwise.
  """
  steps = [0, *(2**i for i in range((config.num_steps - 1).bit_length()))]
  schedule = config.schedule(config.num_steps)
  now: dict[str, Any] = {
    "seed": int(config.seed),
    "learning_rates": [
      [step, float(np.asarray(schedule(step)))] for step in steps
    ],
    "batches": [[step, _digest(source.batch(step))] for step in steps],
    "shapes": sorted([*leaf.shape] for leaf in jax.tree.leaves(state)),
  }
  if reached and path.exists():  # a run of an earlier version recorded none
    with storage.reading(path, "what a run was made with", _ANEW):
      before = storage.parse_json(storage.content(path))
      rates = dict(before["learning_rates"])
      batches = dict(before["batches"])
      found = [f"seed {before['seed']}, now {now['seed']}"] * (
        before["seed"] != now["seed"]
      )
      found += [
        f"learning rate {rates[step]:g} at step {step}, now {rate:g}"
        for step, rate in now["learning_rates"]
        if step < reached and not math.isclose(rates[step], rate, rel_tol=1e-4)
      ][:1]
      if any(
        batches[step] != digest
        for step, digest in now["batches"]
        if step < reached
      ):
        found.append(
          "other data (or their seed, prefix, lengths or batch size)"
        )
      if before.get("shapes", now["shapes"]) != now["shapes"]:
        found.append("another model or optimizer")
    if found:
      raise ValueError(
        f"Expected `output_dir` to be a new folder, or one of the same run, got"
        f" {str(path.parent)!r}, whose {reached} steps were made with "
        f"{'; '.join(found)}; give"
        " another folder, or the configuration and data that it was started "
        "with."
      )
  storage.write_atomically(path, json.dumps(now, indent=1) + "\n")


def _digest(batch: training_batches.Batch) -> str:
  digest = hashlib.sha256()
  for name in sorted(batch):
    array = np.ascontiguousarray(batch[name])
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]
