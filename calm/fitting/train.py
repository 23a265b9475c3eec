"""`train_all`: stages one (Eq. 6), own and two, one after another, by
`calm.training.run`. Stage own is Eq. 6's sum with equal weights on the model's
own texts, which the promise is about (Kim and Rush 2016); stage two trains the
exit classifier and the probes only.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from calm import inference, storage, training
from calm.fitting import request
from calm.fitting.choose import DECODE_TEXTS, full_texts
from calm.training import losses, objectives, read_history, run, sources

OUTPUTS = "outputs.jsonl"
# Validations of a stage; tokens of the longest rows whose gradients are
# computed at a time.
_VALIDATIONS = 8
_PART_TOKENS = 2**12
_SHORTLIST = 512


def recipe(
  name: str, num_parameters: int, num_rows: int
) -> tuple[int, float, training.TrainConfig]:
  """Rows a step, dropout and the run of a stage, by the size of the model:
  T5X's fine-tuning values (Adafactor at a constant 1e-3, dropout 0.1); below 20
  M parameters the packed model's rates, 1e-2 with warm-up and decay, and little
  dropout. Stage own ends at a low rate.
  """
  batch = 1 << (int(np.clip(num_rows // 4, 4, 64)).bit_length() - 1)
  if name == "two":
    schedule = training.Schedule(
      peak=1e-2, warmup_steps=20, final_fraction=0.05
    )
    return (
      batch,
      0.0,
      training.TrainConfig(300, schedule, training.adam, patience=3),
    )
  small = num_parameters < 20_000_000
  own = name == "own"
  steps = int(np.clip((10 if small else 3) * num_rows // batch, 100, 20_000))
  schedule = training.Schedule(
    peak=1e-2 if small else 1e-3,
    warmup_steps=20 if own else min(100, steps // 10),
    final_fraction=0.05 if small or own else 1.0,
  )
  return batch, 0.05 if small else 0.1, training.TrainConfig(steps, schedule)


@dataclasses.dataclass(frozen=True)
class Trained:
  """The report of a stage: (step, validation loss) of every validation."""

  name: str
  losses: tuple[tuple[int, float], ...]

  def __str__(self) -> str:
    best = min(self.losses, key=lambda entry: entry[1])
    return (
      f"Stage {self.name}: {self.losses[-1][0]} steps; validation loss "
      f"{self.losses[0][1]:.3f}"
      f" at step {self.losses[0][0]}, best {best[1]:.3f} at step {best[0]}."
    )


def train_stages(
  fit: request.Fit,
) -> tuple[inference.Predictor, tuple[Trained, ...]]:
  """Trains stage one, where rows have references, own and two; returns the
  trained model under its limits, and the reports. Finished stages are not
  trained again.
  """
  predictor = fit.source
  initial = fit.initial
  rows = fit.splits
  folder = fit.output / "splits"
  names = ["one"] if all(row.targets for row in rows.train) else []
  names, done = [*names, "own", "two"], []
  for name in names:
    if name == "own":
      folder = fit.work / "own_texts"
      rows = write_own_texts(fit, predictor, folder)
    seconds = fit.options.budget and fit.options.budget / len(names)
    given = fit, name, predictor, initial, rows, folder, seconds
    make = functools.partial(train_stage, *given)
    key = {"initial": str(initial)}
    done.append(
      storage.cached(fit.results, Trained, f"trained_{name}", key, make)
    )
    initial = fit.work / f"stage_{name}" / sources.MODEL_FOLDER
    predictor = inference.load(initial, batch_size=fit.options.batch_size)
  return predictor, tuple(done)


def write_own_texts(
  fit: request.Fit, predictor: inference.Predictor, folder: pathlib.Path
) -> request.Splits:
  """The splits with the full model's texts in the place of references. Training
  reads their tokens (`OUTPUTS`): a text which the length limit cut off has no
  end to learn.
  """
  rows = (*fit.splits.validation, *fit.splits.train)
  count = len(fit.splits.validation)
  bulk = predictor.with_options(batch_size=64)
  records = full_texts(bulk, rows, fit.results, fit.step(DECODE_TEXTS))
  own = tuple(
    dataclasses.replace(row, targets=(record.prediction,))
    for row, record in zip(rows, records, strict=True)
  )
  replaced = dataclasses.replace(
    fit.splits, validation=own[:count], train=own[count:]
  )
  request.write(folder, replaced, names=("validation", "train"))
  lines = [storage.dump_line({"id": r.id, "tokens": r.tokens}) for r in records]
  storage.write_atomically(folder / OUTPUTS, "".join(lines))
  return replaced


def train_stage(
  fit: request.Fit,
  name: str,
  model: inference.Predictor,
  initial: pathlib.Path,
  splits: request.Splits,
  rows_folder: pathlib.Path,
  seconds: float | None,
) -> Trained:
  """Trains or resumes stage 'one', 'own' or 'two' from `model`, whose
  checkpoint is `initial`, on the `splits` that `request.write` wrote to
  `rows_folder`, for at most `seconds` (None: the recipe's steps), and exports
  it to `stage_`name/model in `fit.work`.
  """
  progress = fit.step(f"Train stage {name}")
  folder = fit.work / f"stage_{name}"
  num_parameters = sum(x.size for x in jax.tree.leaves(model.params))
  batch_size, dropout_rate, config = recipe(
    name, num_parameters, len(splits.train)
  )
  options = model.options
  vocabulary = model.vocabulary
  steps = config.num_steps
  limits = options.max_input_length, options.max_decode_length
  train, validation = (
    str(rows_folder / f"{part}.jsonl") for part in ("train", "validation")
  )
  shortlist = sources.frequent_tokens((train,), vocabulary, _SHORTLIST)
  sampled = 2 if model.num_layers > 2 else None
  objective: objectives.Objective = {
    "one": objectives.LayerWeighted(sampled_layers=sampled),
    "own": objectives.LayerWeighted(
      losses.equal_weights, sampled_layers=sampled
    ),
    "two": objectives.ExitProbes(tuple(shortlist), classifier=True),
  }[name]
  # A power of two of parts, each with the memory of few tokens.
  rows = max(1, min(batch_size, _PART_TOKENS // sum(limits)))
  outputs = rows_folder / OUTPUTS
  count = len(splits.validation)
  common: dict[str, Any] = {
    "prefix": options.task_prefix,
    "seed": fit.options.seed,
  }
  common["outputs"] = str(outputs) if outputs.is_file() else ""

  def read(file, buckets, size):
    return sources.supervised(file, vocabulary, buckets, size, **common)

  halves = (-(-limits[0] // 2), -(-limits[1] // 2))
  held = min(batch_size, 4 * rows, count)
  data = run.Data(
    read(train, tuple(dict.fromkeys((halves, limits))), batch_size),
    {"rows": read(validation, (limits,), held)},
    {"rows": count // held},
  )

  def report(step, text):
    return progress(step / steps, f"step {step} of {steps}, {text}")

  run.train(
    data,
    objective,
    dataclasses.replace(
      config,
      seed=fit.options.seed,
      eval_every=-(-steps // _VALIDATIONS),
      log_every=1,
      num_microbatches=batch_size >> (rows.bit_length() - 1),
      seconds=seconds,
    ),
    run.Export(vocabulary, options.task_prefix, *limits, shortlist=shortlist),
    str(folder),
    model=dataclasses.replace(
      model.config,
      dropout_rate=dropout_rate,
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
  return Trained(
    name, tuple((int(e["step"]), float(e["loss"])) for e in history)
  )
