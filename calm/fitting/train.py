"""`train_all`: stages one (Eq. 6), own and two, one after another, by `calm.training.run`.

Stage own is Eq. 6's sum with equal weights on texts that the model itself writes, since the
promise is about the full model's text (sequence-level distillation, Kim and Rush 2016); stage
two trains the exit classifier and the probes only. A stopped stage resumes from its checkpoint.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from calm import inference, storage, training
from calm.console import Report
from calm.fitting import request
from calm.fitting.choose import DECODE_TEXTS, full_texts
from calm.inference import result_cache
from calm.training import losses, objectives, read_history, run, sources

OUTPUTS = "outputs.jsonl"
# Validations of a stage; tokens of the longest rows whose gradients are computed at a time.
_VALIDATIONS, _PART_TOKENS, _SHORTLIST = 8, 2**12, 512


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Hyperparameters of one stage: rows a step, dropout, and the run."""

  batch_size: int
  dropout_rate: float
  config: training.TrainConfig


def recipe(name: str, num_parameters: int, num_rows: int) -> Recipe:
  """The recipe of a stage by the size of the model.

  Pretrained sizes have T5's and T5X's fine-tuning values: Adafactor at a constant 1e-3, dropout
  0.1. Models below 20 M parameters learn at the packed model's rates: 1e-2 with warm-up and
  decay, and little dropout. Stage own ends at a low rate.
  """
  batch = 1 << (int(np.clip(num_rows // 4, 4, 64)).bit_length() - 1)
  if name == "two":
    schedule = training.Schedule(peak=1e-2, warmup_steps=20, final_fraction=0.05)
    config = training.TrainConfig(300, schedule, training.adam, patience=3)
    return Recipe(batch, 0.0, config)
  small, own = num_parameters < 20_000_000, name == "own"
  steps = int(np.clip((10 if small else 3) * num_rows // batch, 100, 20_000))
  schedule = training.Schedule(
    peak=1e-2 if small else 1e-3,
    warmup_steps=20 if own else min(100, steps // 10),
    final_fraction=0.05 if small or own else 1.0,
  )
  return Recipe(batch, 0.05 if small else 0.1, training.TrainConfig(steps, schedule))


@dataclasses.dataclass(frozen=True)
class Trained:
  """The report of a stage: (step, validation loss) of every validation."""

  name: str
  losses: tuple[tuple[int, float], ...]

  def __str__(self) -> str:
    best = min(self.losses, key=lambda entry: entry[1])
    return (
      f"Stage {self.name}: {self.losses[-1][0]} steps; validation loss {self.losses[0][1]:.3f}"
      f" at step {self.losses[0][0]}, best {best[1]:.3f} at step {best[0]}."
    )


def train_stages(
  source: inference.Predictor,
  initial: pathlib.Path,
  splits: request.Splits,
  output: pathlib.Path,
  options: request.FitOptions,
  cache: result_cache.ResultCache,
  step: Callable[[str], Report],
) -> tuple[inference.Predictor, tuple[Trained, ...]]:
  """Trains stage one, where rows have references, own and two.

  Args:
    source: the given model under its limits and prefix.
    initial: its folder.
    splits: rows.
    output: folder of the fit, in which `splits` are written.
    options: of the fit.
    cache: reports of finished stages, which are not trained again.
    step: called with the title of a step; returns its progress callback.

  Returns:
    The trained model under its limits, and the reports.
  """
  predictor, rows, done = source, splits, []
  work, rows_folder = output / "fit", output / "splits"
  names = ["one"] if all(row.targets for row in splits.train) else []
  names += ["own", "two"]
  for name in names:
    if name == "own":
      rows_folder = work / "own_texts"
      rows = write_own_texts(predictor, splits, rows_folder, cache, step(DECODE_TEXTS))
    make = functools.partial(
      train_stage,
      name,
      predictor,
      initial,
      rows,
      rows_folder,
      work / f"stage_{name}",
      seed=options.seed,
      seconds=options.budget and options.budget / len(names),
      progress=step(f"Train stage {name}"),
    )
    done.append(cache.get(Trained, f"trained_{name}", {"initial": str(initial)}, make))
    initial = work / f"stage_{name}" / run.MODEL_FOLDER
    predictor = inference.load(initial, batch_size=options.batch_size)
  return predictor, tuple(done)


def write_own_texts(
  predictor: inference.Predictor,
  splits: request.Splits,
  folder: pathlib.Path,
  cache: result_cache.ResultCache,
  progress: Report,
) -> request.Splits:
  """The splits with the full model's texts in the place of references.

  Training reads their tokens (`OUTPUTS`), so that a text which the length limit cut off has no
  end to learn.
  """
  rows = (*splits.validation, *splits.train)
  bulk = predictor.with_options(batch_size=64)
  records = full_texts(bulk, rows, cache, progress)
  count = len(splits.validation)
  own = tuple(
    dataclasses.replace(row, targets=(record.prediction,))
    for row, record in zip(rows, records, strict=True)
  )
  parts = {"validation": own[:count], "train": own[count:]}
  replaced = dataclasses.replace(splits, **parts)
  request.write(folder, replaced, names=tuple(parts))
  lines = [json.dumps({"id": r.id, "tokens": r.tokens}) + "\n" for r in records]
  storage.write_atomically(folder / OUTPUTS, "".join(lines))
  return replaced


def train_stage(
  name: str,
  model: inference.Predictor,
  initial: pathlib.Path,
  splits: request.Splits,
  rows_folder: pathlib.Path,
  folder: pathlib.Path,
  *,
  seed: int,
  seconds: float | None,
  progress: Report,
) -> Trained:
  """Trains or resumes stage 'one', 'own' or 'two', and exports the model to `folder`/model.

  It starts from `model`, whose checkpoint is `initial`, and reads the `splits` that
  `request.write` wrote to `rows_folder`, for at most `seconds` (None: the recipe's steps).
  """
  made = recipe(name, sum(x.size for x in jax.tree.leaves(model.params)), len(splits.train))
  options, vocabulary = model.options, model.vocabulary
  limits = options.max_input_length, options.max_decode_length
  shortlist = sources.frequent_tokens(
    (str(rows_folder / "train.jsonl"),), vocabulary, _SHORTLIST
  )
  sampled = 2 if model.num_layers > 2 else None
  objective: objectives.Objective = {
    "one": objectives.LayerWeighted(sampled_layers=sampled),
    "own": objectives.LayerWeighted(losses.equal_weights, sampled_layers=sampled),
    "two": objectives.ExitProbes(tuple(shortlist), classifier=True),
  }[name]
  # A power of two of parts, each with the memory of few tokens.
  rows = max(1, min(made.batch_size, _PART_TOKENS // sum(limits)))
  steps = made.config.num_steps
  report = lambda step, text: progress(step / steps, f"step {step} of {steps}, {text}")
  run.train(
    _data(model, splits, rows_folder, made.batch_size, 4 * rows, seed),
    objective,
    dataclasses.replace(
      made.config,
      seed=seed,
      eval_every=-(-steps // _VALIDATIONS),
      log_every=1,
      num_microbatches=made.batch_size >> (rows.bit_length() - 1),
      seconds=seconds,
    ),
    run.Export(vocabulary, options.task_prefix, *limits, shortlist=shortlist),
    str(folder),
    model=dataclasses.replace(
      model.config,
      dropout_rate=made.dropout_rate,
      one_hot_embedding=False,
      **dict.fromkeys(("exit_classifier", *objective.parts), True),
    ),
    initial=str(initial),
    fresh=objective.parts,
    listener=training.Listener(
      on_start=lambda step, count: report(step, "compiling"),
      on_step=lambda step, scalars: report(step, f"loss {scalars['loss']:.3f}"),
    ),
  )
  history = read_history(folder / "validation.json")
  return Trained(name, tuple((int(e["step"]), float(e["loss"])) for e in history))


def _data(model, splits, rows_folder, batch_size: int, most: int, seed: int) -> run.Data:
  """Training rows in two buckets of lengths; of validation rows `most` at a time."""
  outputs, count = rows_folder / OUTPUTS, len(splits.validation)
  limits = model.options.max_input_length, model.options.max_decode_length
  common: dict[str, Any] = {"prefix": model.options.task_prefix, "seed": seed}
  common["outputs"] = str(outputs) if outputs.is_file() else ""
  read = lambda part, buckets, size: sources.supervised(
    str(rows_folder / f"{part}.jsonl"), model.vocabulary, buckets, size, **common
  )
  halves = -(-limits[0] // 2), -(-limits[1] // 2)
  rows = min(batch_size, most, count)
  train = read("train", tuple(dict.fromkeys((halves, limits))), batch_size)
  return run.Data(train, {"rows": read("validation", (limits,), rows)}, {"rows": count // rows})
