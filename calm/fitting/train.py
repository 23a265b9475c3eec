"""`train_all`: stages one (Eq. 6), own and two, one after another.

Stage own is Eq. 6's sum with equal weights on texts that the model itself writes, since the
promise is about the full model's text (sequence-level distillation, Kim and Rush 2016); stage
two trains the exit classifier and the probes only. A stopped stage resumes from its checkpoint.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from calm import exits, inference, storage, training
from calm.calibrate import Prompt
from calm.data import training_batches
from calm.fitting import splits as splits_lib
from calm.fitting.options import FitOptions
from calm.inference import grid, result_cache
from calm.t5 import network
from calm.training import losses, objectives, read_history, run, sources

Progress = Callable[[float, str], None]
Bucket = tuple[int, int]
TEXTS = "texts"
DECODE_TEXTS = "Decode the rows that train, at full depth"
# Shares of a budget, among the parts that a fit has.
_SHARES = {"one": 0.5, TEXTS: 0.15, "own": 0.25, "two": 0.1}
# Rows of a batch of own texts, and rows of a file of them, the unit in which a run resumes.
BATCH, CHUNK = 64, 512
OUTPUTS = "outputs.jsonl"
_DENOISING_LENGTH, _LEAST_TEXT, _SHORTLIST = 96, 16, 512
# A budget with room for fewer steps is refused; the least budget that is named has room for a
# machine that is slower the next time.
LEAST_STEPS, _ROOM = 20, 1.25
# At most this share of a budget validates; a row of validation costs this share of a step's.
_VALIDATIONS, _VALIDATING, _FORWARD = 8, 0.2, 0.4
# Shares of the rows in the buckets of `buckets`.
_BUCKET_SHARES = (0.4, 0.35, 0.25)


def own_texts(
  predictor: inference.Predictor,
  rows: Sequence[Prompt],
  folder: pathlib.Path,
  progress: Progress,
  *,
  name: str = "train",
  seconds: float | None = None,
) -> list[dict[str, Any]]:
  """[num_rows] {id, prediction, tokens} of the full model's texts; a stopped run resumes.

  Args:
    predictor: the model under its limits and prefix.
    rows: to decode, in chunks of `CHUNK`.
    folder: keeps a file a chunk.
    progress: called with the share done.
    name: of the chunks' files.
    seconds: after which no further chunk begins; None: all rows are decoded.
  """
  predictor, begun = predictor.with_options(batch_size=BATCH), time.monotonic()
  folder.mkdir(parents=True, exist_ok=True)
  found: list[dict[str, Any]] = []
  for start in range(0, len(rows), CHUNK):
    if found and seconds is not None and time.monotonic() - begun > seconds:
      break
    chunk, file = rows[start : start + CHUNK], folder / f"{name}-{start:08d}.json"

    def report(share: float, text: str, start: int = start, count: int = len(chunk)) -> None:
      del text
      done = start + share * count
      progress(done / len(rows), f"{round(done)} of {len(rows)} rows")

    kept = storage.parse_json(storage.content(file)) if file.is_file() else {}
    if set(kept) != {row.id for row in chunk}:
      records = grid.with_rule(predictor, chunk, exits.StaticExit(), progress=report)
      kept = {r.id: {"prediction": r.prediction, "tokens": r.tokens} for r in records}
      storage.write_atomically(file, json.dumps(kept, ensure_ascii=False) + "\n")
    found += [{"id": row.id, **kept[row.id]} for row in chunk]
  return found


# ---- Recipes


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Hyperparameters of one stage.

  Attributes:
    peak: highest learning rate.
    warmup_steps: steps to the peak.
    final_fraction: of the peak, at the end; 1 is constant.
    optimizer: 'adafactor' or 'adam'.
    dropout_rate: of the network.
    batch_size: rows a step.
    num_steps: updates without a budget.
    sampled_layers: layers whose heads are computed a step (Eq. 6, sampled); None: all.
    denoising: steps of span corruption for ten of the task.
    patience: validations without gain before training stops; None: it does not stop.
  """

  peak: float
  warmup_steps: int
  final_fraction: float
  optimizer: str
  dropout_rate: float
  batch_size: int
  num_steps: int
  sampled_layers: int | None = None
  denoising: int = 0
  patience: int | None = None


def recipe(name: str, config: network.T5Config, num_rows: int) -> Recipe:
  """The recipe of a stage by the size of the model.

  Pretrained sizes have T5's and T5X's fine-tuning values: Adafactor at a constant 1e-3, dropout
  0.1. Models below 20 M parameters learn at the packed model's rates: 1e-2 with warm-up and
  decay, little dropout, and span corruption beside the task. Stage own ends at a low rate.
  """
  batch = 1 << (int(np.clip(num_rows // 4, 4, 64)).bit_length() - 1)
  if name == "two":
    return Recipe(1e-2, 20, 0.05, "adam", 0.0, batch, 300, patience=3)
  small = num_parameters(config) < 20_000_000
  steps = int(np.clip((10 if small else 3) * num_rows // batch, 100, 20_000))
  own = name == "own"
  return Recipe(
    peak=1e-2 if small else 1e-3,
    warmup_steps=20 if own else min(100, steps // 10),
    final_fraction=0.05 if small or own else 1.0,
    optimizer="adafactor",
    dropout_rate=0.05 if small else 0.1,
    batch_size=batch,
    num_steps=steps,
    sampled_layers=2 if config.num_decoder_layers > 2 else None,
    denoising=int(small and not own),
  )


def num_parameters(config: network.T5Config) -> int:
  """Approximate number of parameters: matrices only."""
  mlp = (len(config.mlp_activations) + 1) * config.mlp_dim * config.emb_dim
  attention = 4 * config.num_heads * config.head_dim * config.emb_dim
  layers = config.num_encoder_layers * (attention + mlp)
  layers += config.num_decoder_layers * (2 * attention + mlp)
  heads = 1 if config.logits_via_embedding else 2
  return layers + heads * config.vocab_size * config.emb_dim


def row_bytes(config: network.T5Config, bucket: Bucket) -> int:
  """Approximate bytes of the float32 activations of one row of (input, target) length."""
  read, written = bucket
  emb, mlp, heads = config.emb_dim, 5 * config.mlp_dim, config.num_heads
  width = heads * config.head_dim
  # Three times the attention weights: logits, softmax, and after dropout.
  encoder = read * (3 * heads * read + 9 * emb + 4 * width + mlp)
  decoder = written * (3 * heads * (read + written) + 12 * emb + 8 * width + mlp)
  layers = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
  return 4 * (layers + 3 * written * config.vocab_size)


def microbatches(config: network.T5Config, bucket: Bucket, rows: int) -> int:
  """Parts of a batch of `rows`, a power of two, with at most 2 GiB of activations each."""
  fitting = max(1, min(rows, 2**31 // row_bytes(config, bucket)))
  return rows >> (fitting.bit_length() - 1)


def buckets(
  input_lengths: Sequence[int], target_lengths: Sequence[int], limits: Bucket
) -> tuple[Bucket, ...]:
  """Padded (input, target) lengths of training batches, ascending, the last one the limits."""
  found = []
  for shares in ((0.4, 0.9), (0.75, 0.97)):
    sizes = [
      min(limit, -(-int(np.quantile(values, share)) // 8) * 8)
      for values, share, limit in zip(
        (input_lengths, target_lengths), shares, limits, strict=True
      )
    ]
    found.append((sizes[0], sizes[1]))
  return tuple(dict.fromkeys([*found, limits]))


# ---- One stage


@dataclasses.dataclass(frozen=True)
class Plan:
  """Updates of a stage, and updates between two validations."""

  num_steps: int
  eval_every: int


@dataclasses.dataclass(frozen=True)
class Trained:
  """The report of a stage.

  Attributes:
    name: 'one', 'own' or 'two'.
    steps: updates.
    seconds: wall-clock time of this run.
    losses: (step, validation loss) of every validation.
    note: what the validation loss did.
  """

  name: str
  steps: int
  seconds: float
  losses: tuple[tuple[int, float], ...]
  note: str


@dataclasses.dataclass(frozen=True)
class Timed:
  """Seconds of one update of `rows` of the longest rows, of compiling, and of timing them."""

  rows: int
  seconds: float
  compiling: float
  spent: float


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage to train.

  Attributes:
    name: 'one', 'own' or 'two'.
    initial: the checkpoint that it starts from.
    model: the same, opened under its limits and prefix.
    splits: rows.
    rows_folder: where `splits.write` wrote them.
    folder: of the run.
    options: of the fit.
  """

  name: str
  initial: pathlib.Path
  model: inference.Predictor
  splits: splits_lib.Splits
  rows_folder: pathlib.Path
  folder: pathlib.Path
  options: FitOptions

  @property
  def exported(self) -> pathlib.Path:
    """The trained model."""
    return self.folder / run.MODEL_FOLDER

  @property
  def recipe(self) -> Recipe:
    return recipe(self.name, self.model.config, len(self.splits.train))

  @property
  def sizes(self) -> network.T5Config:
    """The network that is trained, with the parts that the stage adds."""
    parts = dict.fromkeys(("exit_classifier", *self._objective().parts), True)
    return dataclasses.replace(
      self.model.config, dropout_rate=self.recipe.dropout_rate, one_hot_embedding=False, **parts
    )

  def train(self, plan: Plan, progress: Progress, say: Callable[[str], None]) -> Trained:
    """Trains or resumes."""
    start, total = time.monotonic(), 1
    made, export = self.recipe, self._export()
    objective = self._objective(export.shortlist)

    def begun(step: int, num_steps: int) -> None:
      nonlocal total
      total = num_steps
      progress(0.0, f"step {step} of {num_steps}, compiling")

    def advance(step: int, scalars: dict[str, float]) -> None:
      progress(step / total, f"step {step} of {total}, loss {scalars['loss']:.3f}")

    run.train(
      self._data(export),
      objective,
      training.TrainConfig(
        num_steps=plan.num_steps,
        schedule=training.Schedule(
          peak=made.peak,
          warmup_steps=min(made.warmup_steps, plan.num_steps // 5),
          final_fraction=made.final_fraction,
        ),
        optimizer=getattr(training, made.optimizer),
        seed=self.options.seed,
        eval_every=plan.eval_every,
        log_every=1,
        patience=made.patience,
        num_microbatches=microbatches(self.sizes, self._buckets()[-1], made.batch_size),
      ),
      export,
      str(self.folder),
      model=self.sizes,
      initial=str(self.initial),
      fresh=objective.parts,
      listener=training.Listener(on_start=begun, on_step=advance),
    )
    history = read_history(self.folder / "validation.json")
    by_step = tuple((int(entry["step"]), float(entry["loss"])) for entry in history)
    best = min(by_step, key=lambda entry: entry[1])
    note = (
      f"Validation loss {by_step[0][1]:.3f} at step {by_step[0][0]}, best {best[1]:.3f} at"
      f" {best[0]}; the recipe has {made.num_steps} steps."
    )
    say(f"Stage {self.name}: {by_step[-1][0]} steps. {note}")
    return Trained(self.name, by_step[-1][0], time.monotonic() - start, by_step, note)

  def plan(self, timed: Timed | None, say: Callable[[str], None]) -> Plan:
    """As many steps as the budget allows, by a timed update; the recipe's without a budget."""
    steps, validations = self.recipe.num_steps, _VALIDATIONS
    if self.options.budget is not None:
      each, overhead, validation = self._seconds(timed or self.time_update())
      room = max(0.0, self.options.budget * share_of(self.name, self.options) - overhead)
      validations = int(np.clip(_VALIDATING * room / validation, 1, _VALIDATIONS))
      least, most = min(LEAST_STEPS, steps), 10 * steps
      affordable = int(np.clip((room - validations * validation) / each, least, most))
      say(
        f"Stage {self.name}: {each:.2f} s a step, {affordable} steps in the budget (the recipe"
        f" has {steps}: {_time(steps * each + overhead)})."
      )
      steps, validations = affordable, min(validations, affordable)
    return Plan(steps, -(-steps // validations))

  def least_budget(self, timed: Timed) -> float:
    """Seconds of a whole fit's budget in which this stage makes `LEAST_STEPS` steps."""
    each, overhead, validation = self._seconds(timed)
    steps = min(LEAST_STEPS, self.recipe.num_steps)
    return (overhead + validation + steps * each) / share_of(self.name, self.options)

  def time_update(self) -> Timed:
    """Compiles and times an update of a part of a batch of the longest rows, at rate 0."""
    begun = time.perf_counter()
    bucket, made = self._buckets()[-1], self.recipe
    objective = self._objective(range(min(_SHORTLIST, self.model.config.vocab_size)))
    start = run.starting_point(self.sizes, str(self.initial), 0, parts=objective.parts)
    rows = made.batch_size // microbatches(start.model, bucket, made.batch_size)
    config = training.TrainConfig(
      num_steps=100,
      schedule=training.Schedule(peak=0.0, warmup_steps=1),
      optimizer=getattr(training, made.optimizer),
    )
    net = network.Transformer(start.model)
    step = training.make_train_step(net, config, objective, start.params)
    state = training.init_state(start.params, config, objective)
    row = np.ones(bucket[0], np.int32), np.ones(bucket[1], np.int32)
    batch = training_batches.pad_batch([row] * rows, training_batches.Bucket(*bucket))
    times = []
    for _ in range(3):
      since = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
      times.append(time.perf_counter() - since)
    best = min(times[1:])
    return Timed(rows, best, times[0] - best, time.perf_counter() - begun)

  def _seconds(self, timed: Timed) -> tuple[float, float, float]:
    """Seconds of a step, on average over lengths, of timing and compiling, of a validation."""
    found = self._buckets()
    size = [row_bytes(self.model.config, bucket) for bucket in found]
    shares = np.array(_BUCKET_SHARES[-len(found) :])
    average = float(np.average(size, weights=shares)) / size[-1]
    each = average * timed.seconds * self.recipe.batch_size / timed.rows
    overhead = timed.spent + timed.compiling * (1 + len(found))  # and one that validates
    count = len(self.splits.validation)
    return each, overhead, _FORWARD * timed.seconds * count / timed.rows

  def _buckets(self) -> tuple[Bucket, ...]:
    encode, options = self.model.vocabulary.encode, self.model.options
    rows = self.splits.train
    inputs = [len(encode(options.task_prefix + row.input)) + 1 for row in rows]
    targets = [len(encode(row.targets[0] if row.targets else "")) + 1 for row in rows]
    return buckets(inputs, targets, (options.max_input_length, options.max_decode_length))

  def _objective(self, shortlist: Sequence[int] = (0, 1)) -> objectives.Objective:
    """What the stage minimises; probes read `shortlist`."""
    if self.name == "two":
      if self.model.config.per_layer_heads:  # no single head to read a shortlist with
        return objectives.ExitClassifier()
      return objectives.ExitProbes(tuple(shortlist), classifier=True)
    sampled = self.recipe.sampled_layers
    if self.name == "one":
      return objectives.LayerWeighted(sampled_layers=sampled)
    return objectives.LayerWeighted(losses.equal_weights, sampled_layers=sampled)

  def _export(self) -> run.Export:
    vocabulary, (inputs, targets) = self.model.vocabulary, self._buckets()[-1]
    train = str(self.rows_folder / "train.jsonl")
    return run.Export(
      vocabulary=vocabulary,
      task_prefix=self.model.options.task_prefix,
      max_input_length=inputs,
      max_decode_length=targets,
      shortlist=sources.frequent_tokens((train,), vocabulary, _SHORTLIST),
    )

  def _data(self, export: run.Export) -> run.Data:
    made, found, vocabulary = self.recipe, self._buckets(), export.vocabulary
    seed, validation = self.options.seed, len(self.splits.validation)
    # Without gradients one layer's activations live at a time.
    parts = microbatches(self.model.config, found[-1], made.batch_size)
    rows = min(made.batch_size, validation, 4 * made.batch_size // parts)
    outputs = self.rows_folder / OUTPUTS
    common = {
      "prefix": export.task_prefix,
      "seed": seed,
      "outputs": str(outputs) if outputs.is_file() else "",
    }
    path = str(self.rows_folder / "train.jsonl")
    train: Any = sources.supervised(path, vocabulary, found, made.batch_size, **common)
    if made.denoising and self._denoises():
      denoising = sources.denoising(
        ((path, ""),), vocabulary, _DENOISING_LENGTH, made.batch_size, seed=seed + 1
      )
      counts = (10, made.denoising)
      train = training_batches.Mixture((train, denoising), counts, seed)
    path = str(self.rows_folder / "validation.jsonl")
    held_out = sources.supervised(path, vocabulary, found[-1:], rows, **common)
    return run.Data(train, {"rows": held_out}, {"rows": max(1, validation // rows)})

  def _denoises(self) -> bool:
    """Whether span corruption has the sentinels and the texts that it needs."""
    sentinels = getattr(self.model.vocabulary, "extra_ids", 0)
    texts = {row.input for row in self.splits.train}
    long = sum(len(self.model.vocabulary.encode(text)) >= _LEAST_TEXT for text in texts)
    return long >= self.recipe.batch_size and sentinels >= _DENOISING_LENGTH * 0.15 / 3 + 1


# ---- All stages


def share_of(name: str, options: FitOptions) -> float:
  """The share of the budget of a stage, or of decoding own texts."""
  names = [*options.trains, *([TEXTS] if options.learns_own_texts else [])]
  return _SHARES[name] / sum(_SHARES[each] for each in names)


def titles(options: FitOptions) -> list[str]:
  """Titles of the steps, in order."""
  found = [f"Train stage {name}" for name in options.trains]
  if options.learns_own_texts:
    found.insert(int(options.trains[0] == "one"), DECODE_TEXTS)
  return found


def time_stages(
  source: inference.Predictor,
  initial: pathlib.Path,
  splits: splits_lib.Splits,
  options: FitOptions,
  say: Callable[[str], None],
) -> Mapping[str, Timed]:
  """An update of every stage, timed on the given model; none without a budget.

  Raises:
    ValueError: the budget leaves a stage too few steps after compiling (says the least).
  """
  if options.budget is None:
    return {}
  here, least, timed = pathlib.Path(), {}, {}
  for name in options.trains:
    say(f"A step of stage {name} is compiled and timed to plan the budget.")
    stage = Stage(name, initial, source, splits, here, here, options)
    timed[name] = stage.time_update()
    least[name] = stage.least_budget(timed[name])
  short = max(least, key=lambda name: least[name], default=None)
  if short is not None and least[short] > options.budget:
    raise ValueError(
      f"Expected `budget` to be at least {_time(_ROOM * least[short])}, got"
      f" {_time(options.budget)}, which leaves stage {short} fewer than {LEAST_STEPS} steps"
      " after compiling; give that much, or fewer stages, or no budget."
    )
  return timed


def _time(seconds: float) -> str:
  """As `parse_budget` reads it, rounded up."""
  return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"


def train_stages(
  source: inference.Predictor,
  initial: pathlib.Path,
  splits: splits_lib.Splits,
  output: pathlib.Path,
  options: FitOptions,
  timed: Mapping[str, Timed],
  cache: result_cache.ResultCache,
  step: Callable[[str], Progress],
  say: Callable[[str], None],
) -> tuple[inference.Predictor, tuple[Trained, ...]]:
  """Trains all stages; finished ones are taken from the cache.

  Args:
    source: the given model under its limits and prefix.
    initial: its folder.
    splits: rows.
    output: folder of the fit; `splits` are written in it.
    options: of the fit.
    timed: see `time_stages`.
    cache: plans, and reports of finished stages.
    step: called with the title of a step; returns its progress callback.
    say: called with a sentence.

  Returns:
    The trained model under its limits, and the reports.
  """
  predictor, rows, done = source, splits, []
  work, rows_folder = output / "fit", output / "splits"
  for name in options.trains:
    if name != "one" and rows is splits:
      rows_folder = work / "own_texts"
      rows = write_own_texts(predictor, splits, rows_folder, options, step(DECODE_TEXTS), say)
    folder = work / f"stage_{name}"
    stage = Stage(name, initial, predictor, rows, rows_folder, folder, options)
    report, key = step(f"Train stage {name}"), {"initial": str(initial)}
    make = lambda stage=stage: stage.plan(timed.get(stage.name), say)
    plan = cache.get(Plan, f"plan_{name}", key, make)
    train = lambda stage=stage, plan=plan, report=report: stage.train(plan, report, say)
    done.append(cache.get(Trained, f"stage_{name}", key, train))
    initial = stage.exported
    predictor = inference.load(initial, batch_size=options.batch_size)
  return predictor, tuple(done)


def write_own_texts(
  predictor: inference.Predictor,
  splits: splits_lib.Splits,
  folder: pathlib.Path,
  options: FitOptions,
  progress: Progress,
  say: Callable[[str], None],
) -> splits_lib.Splits:
  """The splits with own texts in the place of references, as many as the budget allows.

  Training reads their tokens (`OUTPUTS`), so that a text which the length limit cut off has no
  end to learn.
  """
  seconds = options.budget and options.budget * share_of(TEXTS, options)
  parts, lines = {}, []
  count = len(splits.validation) / max(1, len(splits.validation) + len(splits.train))
  shares = {"validation": (0.0, count), "train": (count, 1.0 - count)}
  for name, (start, size) in shares.items():
    given = getattr(splits, name)
    report = lambda share, text, start=start, size=size: progress(start + size * share, text)
    limit = seconds if name == "train" else None
    texts = own_texts(predictor, given, folder, report, name=name, seconds=limit)
    lines += [json.dumps(entry) + "\n" for entry in texts]
    parts[name] = tuple(
      dataclasses.replace(row, targets=(entry["prediction"],))
      for row, entry in zip(given, texts, strict=False)
    )
  replaced = dataclasses.replace(splits, **parts)
  splits_lib.write(folder, replaced, names=tuple(parts))
  storage.write_atomically(folder / OUTPUTS, "".join(lines))
  late = "" if len(parts["train"]) == len(splits.train) else ", as many as the budget allows"
  say(f"Own texts: of {len(parts['train'])} of {len(splits.train)} rows that train{late}.")
  return replaced
