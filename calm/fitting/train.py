"""`train_all`: the stages one (Eq. 6), own and two, as gin files that `calm train` runs.

Stage own is Eq. 6's sum with equal weights on texts that the model itself writes, since the
promise is about the full model's text (sequence-level distillation, Kim and Rush 2016); stage
two trains the exit classifier and the probes only. A stage's gin file is written before the
stage begins and is what trains, so the folder holds what ran; a stopped stage resumes from its
checkpoint.
"""

import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np

from calm import exits, inference, storage, training
from calm.calibrate import Prompt
from calm.data import training_batches
from calm.fitting import splits as splits_lib
from calm.fitting.options import FitOptions
from calm.inference import offline, result_cache
from calm.t5 import network
from calm.training import losses as losses_lib
from calm.training import objectives, read_history, run

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
_STEPS = re.compile(r"^  num_steps = (\d{1,9})$.*^  eval_every = (\d{1,9})$", re.M | re.S)
# A budget with room for fewer steps is refused; the least budget that is named has room for a
# machine that is slower the next time.
LEAST_STEPS, _ROOM = 20, 1.25
# At most this share of a budget validates; a row of validation costs this share of a step's.
_VALIDATIONS, _VALIDATING, _FORWARD = 8, 0.2, 0.4


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
    folder: keeps the chunks.
    progress: called with the share done.
    name: of the chunks' files.
    seconds: after which no further chunk begins; None: all rows are decoded.
  """
  folder.mkdir(parents=True, exist_ok=True)
  predictor = predictor.with_options(batch_size=BATCH)
  found: list[dict[str, Any]] = []
  begun = time.monotonic()
  for start in range(0, len(rows), CHUNK):
    if found and seconds is not None and time.monotonic() - begun > seconds:
      break
    chunk, file = rows[start : start + CHUNK], folder / f"{name}-{start:08d}.json"

    def told(share: float, text: str, start: int = start, count: int = len(chunk)) -> None:
      del text
      done = start + share * count
      progress(done / len(rows), f"{round(done)} of {len(rows)} rows")

    kept = storage.parse_json(storage.content(file)) if file.is_file() else {}
    if set(kept) != {row.id for row in chunk}:
      records = offline.with_rule(predictor, chunk, exits.StaticExit(), progress=told)
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
  """Approximate bytes of the float32 activations of one row in a training step.

  Args:
    config: sizes.
    bucket: padded (input, target) lengths.
  """
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
  """Seconds of one update of a part of a batch of the longest rows; see `Stage.time_update`."""

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
    folder: of the run; the gin file lies beside it.
    options: of the fit.
    timed: an update, timed; None: it is timed where a budget needs it.
  """

  name: str
  initial: pathlib.Path
  model: inference.Predictor
  splits: splits_lib.Splits
  rows_folder: pathlib.Path
  folder: pathlib.Path
  options: FitOptions
  timed: Timed | None = None

  @property
  def gin_file(self) -> pathlib.Path:
    return self.folder.with_suffix(".gin")

  @property
  def exported(self) -> pathlib.Path:
    """The trained model."""
    return self.folder / run.MODEL_FOLDER

  @property
  def recipe(self) -> Recipe:
    return recipe(self.name, self.model.config, len(self.splits.train))

  def train(self, progress: Progress, say: Callable[[str], None]) -> Trained:
    """Trains or resumes; writes the gin file first where there is none.

    Raises:
      ValueError: the gin file there, which is a program, is not the one that this writes.
    """
    start = time.monotonic()
    if self.gin_file.exists():
      self._check_stored()
    else:
      storage.write_atomically(self.gin_file, self.gin_text(progress, say))
    total = 1

    def begun(step: int, num_steps: int) -> None:
      nonlocal total
      total = num_steps
      progress(0.0, f"step {step} of {num_steps}, compiling")

    def advance(step: int, scalars: dict[str, float]) -> None:
      progress(step / total, f"step {step} of {total}, loss {scalars['loss']:.3f}")

    _run_gin(self.gin_file, self.folder, training.Listener(on_start=begun, on_step=advance))
    history = read_history(self.folder / "validation.json")
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in history)
    best = min(losses, key=lambda entry: entry[1])
    note = f"Validation loss {losses[0][1]:.3f} at step {losses[0][0]}, best {best[1]:.3f} at"
    note += f" {best[0]}; the recipe has {self.recipe.num_steps} steps."
    say(f"Stage {self.name}: {losses[-1][0]} steps. {note}")
    return Trained(self.name, losses[-1][0], time.monotonic() - start, losses, note)

  def gin_text(self, progress: Progress, say: Callable[[str], None]) -> str:
    """The gin file, with as many steps as the budget allows."""
    steps, validations = self.recipe.num_steps, _VALIDATIONS
    if self.options.budget is not None:
      timed = self.timed or self.time_update(progress)
      each, overhead, validation = self._seconds(timed)
      budget = self.options.budget * share_of(self.name, self.options)
      room = max(0.0, budget - overhead)
      validations = int(np.clip(_VALIDATING * room / validation, 1, _VALIDATIONS))
      least, most = min(LEAST_STEPS, steps), 10 * steps
      made = int(np.clip((room - validations * validation) / each, least, most))
      say(
        f"Stage {self.name}: {each:.2f} s a step, {made} steps in the budget (the recipe has"
        f" {steps}: {_time(steps * each + overhead)})."
      )
      steps, validations = made, min(validations, made)
    return self._render(steps, -(-steps // validations))

  def least_budget(self, timed: Timed) -> float:
    """Seconds of a whole fit's budget in which this stage makes `LEAST_STEPS` steps."""
    each, overhead, validation = self._seconds(timed)
    steps = min(LEAST_STEPS, self.recipe.num_steps)
    return (overhead + validation + steps * each) / share_of(self.name, self.options)

  def time_update(self, progress: Progress) -> Timed:
    """Compiles and times an update of a part of a batch of the longest rows, at rate 0."""
    begun = time.perf_counter()
    bucket, made, objective = self._buckets()[-1], self.recipe, self._objective
    if isinstance(objective, objectives.LayerWeighted):
      objective = dataclasses.replace(objective, sampled_layers=made.sampled_layers)
    model = dataclasses.replace(
      self.model.config, exit_classifier=True, dropout_rate=made.dropout_rate
    )
    start = run.starting_point(model, str(self.initial), 0, parts=objective.parts)
    rows = made.batch_size // microbatches(start.model, bucket, made.batch_size)
    config = training.TrainConfig(
      num_steps=100,
      schedule=training.Schedule(peak=0.0, warmup_steps=1),
      optimizer=getattr(training, made.optimizer),
    )
    net = network.Transformer(start.model)
    step = training.make_train_step(net, config, objective, start.params)
    state = training.init_state(start.params, config, objective)
    batch = training_batches.pad_batch(
      [(np.ones(bucket[0], np.int32), np.ones(bucket[1], np.int32))] * rows,
      training_batches.Bucket(*bucket),
    )
    times = []
    for text in (f"compiling for {bucket[0]} tokens", "timing a step", "timing a step"):
      progress(0.0, text)
      since = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
      times.append(time.perf_counter() - since)
    best = min(times[1:])
    return Timed(rows, best, times[0] - best, time.perf_counter() - begun)

  def _seconds(self, timed: Timed) -> tuple[float, float, float]:
    """Seconds of a step, on average over lengths, of timing and compiling, of a validation."""
    found, longest = self._buckets(), row_bytes(self.model.config, self._buckets()[-1])
    lengths = [row_bytes(self.model.config, bucket) / longest for bucket in self._plan(found)]
    each = float(np.mean(lengths)) * timed.seconds * self.recipe.batch_size / timed.rows
    overhead = timed.spent + timed.compiling * (1 + len(found))  # and one that validates
    count = len(self.splits.validation)
    return each, overhead, _FORWARD * timed.seconds * count / timed.rows

  def _plan(self, found: Sequence[Bucket]) -> list[Bucket]:
    """The bucket of every step of an epoch."""
    inputs, targets = self._tokens()
    source = training_batches.Supervised(
      training_batches.Ragged(inputs),
      training_batches.Ragged(targets),
      tuple(training_batches.Bucket(*bucket) for bucket in found),
      self.recipe.batch_size,
      self.options.seed,
    )
    return [dataclasses.astuple(bucket) for _, bucket in source.epoch_plan(0)]

  def _tokens(self) -> tuple[list[list[int]], list[list[int]]]:
    encode, eos_id = self.model.vocabulary.encode, self.model.eos_id
    prefix, rows = self.model.options.task_prefix, self.splits.train
    inputs = [[*encode(prefix + row.input), eos_id] for row in rows]
    targets = [row.targets[0] if row.targets else "" for row in rows]
    return inputs, [[*encode(text), eos_id] for text in targets]

  def _buckets(self) -> tuple[Bucket, ...]:
    inputs, targets = self._tokens()
    options = self.model.options
    limits = (options.max_input_length, options.max_decode_length)
    return buckets([*map(len, inputs)], [*map(len, targets)], limits)

  def _check_stored(self) -> None:
    """Only the numbers of steps, which a budget set, may differ from what would be written."""
    text = storage.content(self.gin_file).decode("utf-8", "replace")
    numbers = _STEPS.search(text)
    if numbers is None or text != self._render(*map(int, numbers.groups())):
      raise ValueError(
        f"Expected {str(self.gin_file)!r} to be the gin file that this fit wrote, got another:"
        " it was edited, moved, or written by another version, and a gin file can run any"
        " program; choose a new folder, or run it yourself with `calm train --gin_file`."
      )

  @property
  def _objective(self) -> objectives.Objective:
    """What the stage minimises."""
    if self.name == "one":
      return objectives.LayerWeighted()
    if self.name == "own":
      return objectives.LayerWeighted(losses_lib.equal_weights)
    if self.model.config.per_layer_heads:  # no single head to read a shortlist with
      return objectives.ExitClassifier()
    listed = range(min(_SHORTLIST, self.model.config.vocab_size))
    return objectives.ExitProbes(tuple(listed), classifier=True)

  def _render(self, num_steps: int, eval_every: int) -> str:
    """The gin file with these numbers of steps."""
    made, found, objective = self.recipe, self._buckets(), self._objective
    validation = len(self.splits.validation)
    parts = microbatches(self.model.config, found[-1], made.batch_size)
    # Without gradients one layer's activations live at a time.
    validation_batch = min(made.batch_size, validation, 4 * made.batch_size // parts)
    sizes = dataclasses.asdict(self.model.config)
    sizes |= {"dropout_rate": made.dropout_rate, "exit_classifier": True}
    sizes |= dict.fromkeys(objective.parts, True) | {"one_hot_embedding": False}
    outputs = self.rows_folder / OUTPUTS
    absolute = lambda path: str(path.absolute())
    environment = jinja2.Environment(
      loader=jinja2.PackageLoader("calm.fitting", "templates"),
      trim_blocks=True,
      lstrip_blocks=True,
      undefined=jinja2.StrictUndefined,
    )
    environment.filters["gin"] = repr
    return environment.get_template("stage.gin.j2").render(
      name=self.name,
      file=absolute(self.gin_file),
      train=absolute(self.rows_folder / "train.jsonl"),
      validation=absolute(self.rows_folder / "validation.jsonl"),
      initial=absolute(self.initial),
      outputs=absolute(outputs) if outputs.is_file() else "",
      sizes=sizes,
      fresh=objective.parts,
      objective=type(objective).__name__,
      recipe=made,
      num_steps=num_steps,
      num_microbatches=parts,
      warmup_steps=min(made.warmup_steps, num_steps // 5),
      seed=self.options.seed,
      eval_every=eval_every,
      validation_batches=max(1, validation // validation_batch),
      validation_batch=validation_batch,
      prefix=self.model.options.task_prefix,
      buckets=found,
      denoises=self._denoises(),
      denoising_length=_DENOISING_LENGTH,
      shortlist=_SHORTLIST,
    )

  def _denoises(self) -> bool:
    """Whether span corruption has the sentinels and the texts that it needs."""
    sentinels = getattr(self.model.vocabulary, "extra_ids", 0)
    texts = {row.input for row in self.splits.train}
    long = sum(len(self.model.vocabulary.encode(text)) >= _LEAST_TEXT for text in texts)
    enough = long >= self.recipe.batch_size and sentinels >= _DENOISING_LENGTH * 0.15 / 3 + 1
    return bool(self.recipe.denoising) and enough


def _run_gin(file: pathlib.Path, output_dir: pathlib.Path, listener: training.Listener) -> None:
  import gin

  gin.clear_config()
  try:
    gin.parse_config_files_and_bindings([str(file)], [])
    gin.get_configurable(run.train)(listener=listener, output_dir=str(output_dir))
  finally:
    gin.clear_config()


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
    timed[name] = stage.time_update(lambda share, text: None)
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
    cache: reports of finished stages.
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
    stage = Stage(name, initial, predictor, rows, rows_folder, folder, options, timed.get(name))
    told = step(f"Train stage {name}")
    key = {"initial": str(initial)}
    train = lambda stage=stage, told=told: stage.train(told, say)
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
    told = lambda share, text, start=start, size=size: progress(start + size * share, text)
    limit = seconds if name == "train" else None
    made = own_texts(predictor, given, folder, told, name=name, seconds=limit)
    lines += [json.dumps(entry) + "\n" for entry in made]
    parts[name] = tuple(
      dataclasses.replace(row, targets=(entry["prediction"],))
      for row, entry in zip(given, made, strict=False)
    )
  replaced = dataclasses.replace(splits, **parts)
  splits_lib.write(folder, replaced, names=tuple(parts))
  storage.write_atomically(folder / OUTPUTS, "".join(lines))
  late = "" if len(parts["train"]) == len(splits.train) else ", as many as the budget allows"
  say(f"Own texts: of {len(parts['train'])} of {len(splits.train)} rows that train{late}.")
  return replaced
