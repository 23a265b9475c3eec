"""Stages of training, as gin files that `calm train` runs: one (Eq. 6), own, and two.

Stage own is Eq. 6's sum again, with all layers alike, on texts that the model itself writes;
stage two trains the exit classifier and the probes alone.

A stage's file is written before it begins and read by what trains, so that what is in the
folder is what ran; a stage that was stopped goes on from its checkpoint.
"""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable

import jinja2

from calm import inference, training
from calm.calibrate.generations import files
from calm.data import training_batches
from calm.fitting import own_texts, pilot, recipes
from calm.fitting.options import FitOptions
from calm.fitting.result import Trained
from calm.fitting.splits import Splits
from calm.training import losses as losses_lib
from calm.training import objectives, read_history, run

Progress = Callable[[float, str], None]
RECIPES = {"one": recipes.stage_one, "own": recipes.stage_own, "two": recipes.stage_two}
# What a budget is divided by, among what there is: own texts are decoded before they train.
TEXTS = "texts"
_SHARES = {"one": 0.5, TEXTS: 0.15, "own": 0.25, "two": 0.1}
_DENOISING_LENGTH, _LEAST_TEXT = 96, 16
_SHORTLIST = 512
_STEPS = re.compile(r"^  num_steps = (\d{1,9})$.*^  eval_every = (\d{1,9})$", re.M | re.S)


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
    options: what the fit is asked for.
    timed: an update of it; None: it is timed where a budget asks for it.
  """

  name: str
  initial: pathlib.Path
  model: inference.Predictor
  splits: Splits
  rows_folder: pathlib.Path
  folder: pathlib.Path
  options: FitOptions
  timed: pilot.Timed | None = None

  @property
  def gin_file(self) -> pathlib.Path:
    return self.folder.with_suffix(".gin")

  @property
  def outputs(self) -> str:
    """Tokens that are learned in the place of references; '' where references are."""
    found = self.rows_folder / own_texts.OUTPUTS
    return str(found.absolute()) if found.is_file() else ""

  @property
  def exported(self) -> pathlib.Path:
    """The trained model."""
    return self.folder / run.MODEL_FOLDER

  def train(self, progress: Progress, say: Callable[[str], None]) -> Trained:
    """Trains, or goes on; writes the gin file first where there is none yet.

    Raises:
      ValueError: the gin file there, which is a program, is not the one that this writes.
    """
    start = time.monotonic()
    if self.gin_file.exists():
      self._check_stored()
    else:
      files.write_atomically(self.gin_file, self._gin(progress, say))
    seen: dict[str, int] = {"first": 0, "steps": 0, "of": 1}

    def begun(step: int, num_steps: int) -> None:
      seen.update(first=step, steps=step, of=num_steps)
      progress(0.0, f"step {step} of {num_steps}, compiling")

    def advance(step: int, scalars: dict[str, float]) -> None:
      seen["steps"] = step
      progress(step / seen["of"], f"step {step} of {seen['of']}, loss {scalars['loss']:.3f}")

    _run_gin(self.gin_file, self.folder, training.Listener(on_start=begun, on_step=advance))
    history = read_history(self.folder / "validation.json")
    found = tuple((int(entry["step"]), float(entry["loss"])) for entry in history)
    seconds = time.monotonic() - start
    recipe = self._recipe
    made = seen["steps"] - seen["first"]  # a run that was stopped had made the others
    whole = seconds * found[-1][0] / made if made else None
    note = more_time(found, whole, recipe.num_steps)
    say(f"Stage {self.name}: {found[-1][0]} steps. {note}")
    return Trained(self.name, found[-1][0], seconds, found, note)

  def _gin(self, progress: Progress, say: Callable[[str], None]) -> str:
    """The gin file, with as many steps as the budget has room for."""
    recipe = self._recipe
    plan = self._plan(recipe, self._buckets(), progress, say)
    return self._render(plan.num_steps, -(-plan.num_steps // plan.num_validations))

  def _check_stored(self) -> None:
    """Only the numbers of steps, which a budget set, may differ from what would be written."""
    text = files.content(self.gin_file).decode("utf-8", "replace")
    numbers = _STEPS.search(text)
    if numbers is None or text != self._render(*map(int, numbers.groups())):
      raise ValueError(
        f"Expected {str(self.gin_file)!r} to be the gin file that this fit wrote, got another:"
        " it was edited, moved, or written by another version, and a gin file can run any"
        " program; choose a new folder, or run it yourself with `calm train --gin_file`."
      )

  def _render(self, num_steps: int, eval_every: int) -> str:
    """The gin file of so many steps."""
    recipe = self._recipe
    buckets = self._buckets()
    validation = len(self.splits.validation)
    parts = recipes.microbatches(self.model.config, buckets[-1], recipe.batch_size)
    # Without gradients one layer's activations live at a time.
    validation_batch = min(recipe.batch_size, validation, 4 * recipe.batch_size // parts)
    sizes = dataclasses.asdict(self.model.config)
    sizes |= {"dropout_rate": recipe.dropout_rate, "exit_classifier": True}
    sizes |= dict.fromkeys(self._objective.parts, True)
    return (
      _environment()
      .get_template("stage.gin.j2")
      .render(
        name=self.name,
        file=self.gin_file.absolute(),
        train=str((self.rows_folder / "train.jsonl").absolute()),
        validation=str((self.rows_folder / "validation.jsonl").absolute()),
        initial=str(self.initial.absolute()),
        outputs=self.outputs,
        sizes=sizes | {"one_hot_embedding": False},
        fresh=self._objective.parts,
        objective=type(self._objective).__name__,
        recipe=recipe,
        num_steps=num_steps,
        num_microbatches=parts,
        warmup_steps=min(recipe.warmup_steps, num_steps // 5),
        seed=self.options.seed,
        eval_every=eval_every,
        validation_batches=max(1, validation // validation_batch),
        validation_batch=validation_batch,
        prefix=self.model.options.task_prefix,
        buckets=buckets,
        denoises=self._denoises(recipe),
        denoising_length=_DENOISING_LENGTH,
        shortlist=_SHORTLIST,
      )
    )

  @property
  def _objective(self) -> objectives.Objective:
    """What the stage minimises, with likely tokens as many as the gin file finds."""
    if self.name == "one":
      return objectives.LayerWeighted()
    if self.name == "own":
      return objectives.LayerWeighted(losses_lib.equal_weights)
    config = self.model.config
    if config.per_layer_heads:  # no one head to ask about likely tokens
      return objectives.ExitClassifier()
    listed = range(min(_SHORTLIST, config.vocab_size))
    return objectives.ExitProbes(tuple(listed), classifier=True)

  def _plan(self, recipe, buckets, progress: Progress, say: Callable[[str], None]):
    """The recipe's steps, or as many as the budget has room for."""
    if self.options.budget is None:
      return pilot.Plan(recipe.num_steps)
    timed = self.timed or self.measure(progress)
    lengths = self._lengths(buckets, recipe.batch_size)
    budget = seconds_of(self.name, self.options)
    assert budget is not None
    made = pilot.plan(
      timed, self.model.config, lengths, recipe, len(self.splits.validation), budget
    )
    whole = recipe.num_steps * made.step_seconds + made.overhead
    say(
      f"Stage {self.name}: {made.step_seconds:.2f} s a step, {made.num_steps} steps in the"
      f" budget (the recipe has {recipe.num_steps}: {_duration(whole)})."
    )
    return made

  def measure(self, progress: Progress) -> pilot.Timed:
    """An update of a part of a batch, timed."""
    recipe, objective = self._recipe, self._objective
    if isinstance(objective, objectives.LayerWeighted):
      objective = dataclasses.replace(objective, sampled_layers=recipe.sampled_layers)
    model = dataclasses.replace(
      self.model.config, exit_classifier=True, dropout_rate=recipe.dropout_rate
    )
    start = run.starting_point(model, str(self.initial), 0, parts=objective.parts)
    told = lambda text: progress(0.0, text)
    return pilot.measure(
      start.model, start.params, objective, recipe, self._buckets()[-1], told
    )

  def least_budget(self, timed: pilot.Timed) -> float:
    """Seconds of a whole fit's budget in which this stage makes enough steps."""
    buckets, recipe = self._buckets(), self._recipe
    lengths = self._lengths(buckets, recipe.batch_size)
    count = len(self.splits.validation)
    seconds = pilot.least_budget(timed, self.model.config, lengths, recipe, count)
    return seconds / share_of(self.name, self.options)

  @property
  def _recipe(self) -> recipes.Recipe:
    return RECIPES[self.name](self.model.config, len(self.splits.train))

  def _lengths(self, buckets, batch_size: int) -> list[tuple[int, int]]:
    """The bucket of every step of an epoch."""
    inputs, targets = self._tokens()
    source = training_batches.Supervised(
      training_batches.Ragged(inputs),
      training_batches.Ragged(targets),
      tuple(training_batches.Bucket(*bucket) for bucket in buckets),
      batch_size,
      self.options.seed,
    )
    return [dataclasses.astuple(bucket) for _, bucket in source.epoch_plan(0)]

  def _tokens(self) -> tuple[list[list[int]], list[list[int]]]:
    encode, eos_id = self.model.vocabulary.encode, self.model.eos_id
    prefix = self.model.options.task_prefix
    rows = self.splits.train
    inputs = [[*encode(prefix + row.input), eos_id] for row in rows]
    targets = [row.targets[0] if row.targets else "" for row in rows]
    return inputs, [[*encode(text), eos_id] for text in targets]

  def _buckets(self) -> tuple[tuple[int, int], ...]:
    inputs, targets = self._tokens()
    options = self.model.options
    limits = (options.max_input_length, options.max_decode_length)
    return recipes.buckets([*map(len, inputs)], [*map(len, targets)], limits)

  def _denoises(self, recipe: recipes.Recipe) -> bool:
    """Whether span corruption has the sentinels and the texts that it needs."""
    sentinels = getattr(self.model.vocabulary, "extra_ids", 0)
    encode = self.model.vocabulary.encode
    texts = {row.input for row in self.splits.train}
    long = sum(len(encode(text)) >= _LEAST_TEXT for text in texts)
    enough = long >= recipe.batch_size and sentinels >= _DENOISING_LENGTH * 0.15 / 3 + 1
    return bool(recipe.denoising) and enough


def seconds_of(name: str, options: FitOptions) -> float | None:
  """The part of the budget that a stage, or decoding own texts, has; None: there is none."""
  return None if options.budget is None else options.budget * share_of(name, options)


def share_of(name: str, options: FitOptions) -> float:
  """The share of the budget that a stage, or decoding own texts, has."""
  names = [*options.trains, *([TEXTS] if options.learns_own_texts else [])]
  return _SHARES[name] / sum(_SHARES[each] for each in names)


def _run_gin(file: pathlib.Path, output_dir: pathlib.Path, listener: training.Listener) -> None:
  import gin

  gin.clear_config()
  try:
    gin.parse_config_files_and_bindings([str(file)], [])
    gin.get_configurable(run.train)(listener=listener, output_dir=str(output_dir))
  finally:
    gin.clear_config()


def more_time(
  losses: tuple[tuple[int, float], ...], seconds: float | None, recipe_steps: int
) -> str:
  """What the validation loss did, and what as much time again would buy.

  Args:
    losses: (step, validation loss), ascending.
    seconds: that the steps took; None: not known.
    recipe_steps: how many the recipe has.
  """
  first, last = losses[0], losses[-1]
  best = min(losses, key=lambda entry: entry[1])
  if len(losses) < 3:
    return f"Validation loss {best[1]:.3f}."
  text = f"Validation loss {first[1]:.3f} at step {first[0]}, best {best[1]:.3f} at {best[0]}"
  whole = ""
  if last[0] < recipe_steps:
    share = recipe_steps / last[0]
    about = "" if seconds is None else f", about {_duration(seconds * share)}"
    whole = f" The recipe has {recipe_steps} steps{about}."
  middle = losses[len(losses) // 2]
  gained = middle[1] - best[1]
  if best[0] < last[0]:
    return f"{text}; the steps after that bought nothing.{whole}"
  again = "" if seconds is None else f" ({_duration(seconds)})"
  return (
    f"{text}; the second half of the steps bought {gained:.3f}: as much again{again} would buy"
    f" less than that.{whole}"
  )


def _duration(seconds: float) -> str:
  return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("calm.fitting", "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters["gin"] = repr
  return environment
