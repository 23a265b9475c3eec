"""Rows and a model -> a folder that serves early exits under a promise."""

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import checkpoints, inference
from calm.calibrate import Calibration, arguments, ledger, looking, seconds
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import locks
from calm.calibrate.losses import sequence_losses
from calm.data import prompt_batches
from calm.fitting import (
  candidates,
  drafts,
  exit_maps,
  inputs,
  known_tokens,
  lengths,
  own_texts,
  pilot,
  reading,
  summary,
  training,
)
from calm.fitting import choose as choose_lib
from calm.fitting import folder as folder_lib
from calm.fitting import last as last_lib
from calm.fitting import splits as splits_lib
from calm.fitting.listening import Listener, on_screen
from calm.fitting.options import FitOptions
from calm.fitting.result import LearnedExits, Point, Result, Trained
from calm.inference import calibrating, grid, offline, result_cache
from calm.inference import options as options_lib
from calm.t5 import parameters

LEARN = "Learn exits beside the frozen weights"
READ = "Choose how weights are read"
CHOOSE = "Choose measure, layers and grid"
CERTIFY = "Certify the threshold"
LOOK = "Look at the last part"
# Rows whose texts exits are learned from: more say little more of linear maps.
MOST_ROWS = 2000
# Of learned propagation.
RANK = 16


@arguments.checked()
def fit(
  model: str | pathlib.Path,
  train: str | pathlib.Path | inputs.Rows,
  *,
  output: str | pathlib.Path,
  tolerance: float = 0.1,
  listener: Listener | None = None,
  **options: Any,
) -> inference.Predictor:
  """Trains exits, chooses how to leave, certifies a threshold, and writes one folder.

  The rows are split by group; nothing is chosen on the prompts that certify, and the last part
  is looked at once, in the end. A run that was stopped goes on when it is called again.

  Args:
    model: a checkpoint folder of any known format, or 'packed'.
    train: rows of {input, target, source}: a file of any format of `calm infer` (JSON Lines,
      a JSON array, CSV, TSV, Parquet), a DataFrame with such columns, or `Prompt`s.
    output: the folder to write; a run of the same request in it goes on.
    tolerance: delta, in (0, 1).
    listener: told of progress; None shows it on standard error, as `calm fit` does.
      `Listener()` is silent.
    **options: fields of `FitOptions`.

  Returns:
    The model in `output`, under its promise. Where no threshold is both certified and faster,
    or training has made full depth worse (`FitOptions.accept_quality`): the model that was
    given, at full depth, its weights untouched.

  Raises:
    ValueError: rows or options that cannot do (before any work), or an `output` of another
      request.
    OSError: `output` cannot be written, or another process fits in it.
  """
  wishes = FitOptions(tolerance=tolerance, **options)
  with contextlib.ExitStack() as stack:
    if listener is None:
      console = rich_console.Console(stderr=True, highlight=False)
      listener = stack.enter_context(on_screen(console))
    stack.enter_context(looking.quiet())
    made = Fit.open(str(model), train, pathlib.Path(output), wishes, listener)
    stack.enter_context(locks.held(output))
    return made.run()


@dataclasses.dataclass(frozen=True)
class Fit:
  """One fit at work; see `fit`."""

  source: inference.Predictor
  own: inference.Predictor
  model: str
  splits: splits_lib.Splits
  folder: folder_lib.Folder
  options: FitOptions
  listener: Listener
  timed: Mapping[str, pilot.Timed]
  told: str = ""

  @classmethod
  def open(
    cls,
    model: str | pathlib.Path,
    train: str | pathlib.Path | inputs.Rows,
    output: pathlib.Path,
    options: FitOptions,
    listener: Listener,
  ) -> "Fit":
    """Everything that may be wrong is found here, before any work."""
    rows = inputs.read_rows(train, options)
    support = sequence_losses.kind_support(options.kind, options.metric)
    splits = splits_lib.split(
      rows,
      trains=options.train_all or options.learns_exits,
      tolerance=options.tolerance,
      error_rate=options.error_rate,
      lower=support.lower,
      seed=options.seed,
    )
    own = inputs.open_model(model, options, listener.say)
    limits, cut = lengths.of_rows(own, rows, options.prefix)
    source = own.with_options(batch_size=options.batch_size, **dataclasses.asdict(limits))
    request = {
      "model": source.parameters_digest,
      "rows": result_cache.prompts_digest(rows),
      "options": options.request,
    }
    timed: dict[str, pilot.Timed] = {}
    folder = folder_lib.Folder.open(
      output,
      request,
      lambda: timed.update(
        training.time_stages(source, str(model), splits, options, listener.say)
      ),
    )
    splits_lib.write(output / "splits", splits)
    longer = f" ({cut} of {len(rows)} inputs are longer and cut at their end)" if cut else ""
    listener.say(
      f"Rows: {splits}. Prefix {limits.task_prefix!r}; inputs of at most"
      f" {limits.max_input_length} tokens{longer}, texts of at most"
      f" {limits.max_decode_length}."
    )
    opened = cls(source, own, str(model), splits, folder, options, listener, timed)
    opened = dataclasses.replace(opened, told=opened.ledger(only_look=True))
    listener.say(opened.population)
    if strange := known_tokens.warning(source, rows):
      listener.say(strange)
    return opened

  @property
  def population(self) -> str:
    """What the promise is about, and who else certified on its rows."""
    return f"{self.splits.population} {self.told}".strip()

  def ledger(self, **options: bool) -> str:
    """Records what the calibration rows are asked; says what else was (`ledger.record`)."""
    asked = {name: getattr(self.options, name) for name in ("kind", "metric", "tolerance")}
    return ledger.record(
      self.folder.work,
      {**asked, ledger.FIT: self.folder.path.name},
      [row.input for row in self.splits.calibration],
      self.options.error_rate,
      around=(self.folder.path, self.model),
      **options,
    )

  def run(self) -> inference.Predictor:
    """All steps; those that an earlier run finished are taken from its folder."""
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", prompt_batches.CutPrompts)  # said when it was opened
      self._make()
    return inference.load(self.folder.path)

  def _make(self) -> None:
    learned = None
    if self.options.learns_exits:
      (predictor, learned), trained = self._learn_exits(), ()
    else:
      predictor, trained = self._train()
    predictor = self._as_read_fastest(predictor)
    choice = self._choose(predictor)
    if choice.best is not None:
      predictor = predictor.with_options(
        **choice.best.candidate.options(predictor.options.max_decode_length), grid=choice.grid
      )
    calibration, curve = self._certify(predictor, choice)
    predictor, result, served = self._look(predictor, trained, choice, calibration)
    result = dataclasses.replace(result, curve=curve, learned=learned)
    self.folder.write(training.folder_of(self.model), predictor, result, served, self.options)
    self.listener.say(result.headline(self.options))
    if served is not None:
      self.listener.say(self.population)

  def _step(self, title: str) -> looking.Report:
    """Says which of how many steps begins."""
    read = [READ] if reading.to_try(self.source) else []
    learn = [training.OWN_TEXTS, LEARN] if self.options.learns_exits else []
    steps = [*learn, *training.titles(self.options), *read, CHOOSE, CERTIFY, LOOK]
    return self.listener.step(f"[{steps.index(title) + 1}/{len(steps)}] {title}")

  def _learn_exits(self) -> tuple[inference.Predictor, LearnedExits]:
    """The model with exits beside its weights, and what was learned."""
    rows = self.splits.train[:MOST_ROWS]
    told = self._step(training.OWN_TEXTS)
    tokens = own_texts.tokens(self.source, rows, self.folder.work / "own_texts", told)
    progress, file = self._step(LEARN), self.folder.work / checkpoints.EXITS
    source, vocabulary = self.source, self.source.vocabulary
    if source.options.shortlist is None and not source.config.per_layer_heads:
      listed = exit_maps.shortlist(tokens, vocabulary.vocab_size)
      source = source.with_options(shortlist=listed)
    base, texts = parameters.base_digest(self.source.params), [row.input for row in rows]

    def learn() -> LearnedExits:
      maps = exit_maps.fit(
        source,
        texts,
        tokens,
        candidates.exit_layers(self.source.num_layers),
        rank=RANK,
        listed=source.options.shortlist,
        seed=self.options.seed,
        progress=progress,
      )
      checkpoints.save_exits(file, maps.parameters(), base)
      return maps.summary(RANK, base)

    # The file is written first: a result without it was never stored.
    learned = self.folder.cache.get(LearnedExits, "exits", {"base": base}, learn)
    self.listener.say(str(learned))
    return source.with_exits(file), learned

  def _train(self) -> tuple[inference.Predictor, tuple[Trained, ...]]:
    """The trained model under its limits, and what its stages did."""
    return training.Training(
      self.source, self.model, self.splits, self.folder, self.options, self.timed
    ).run(self._step, self.listener.say)

  def _as_read_fastest(self, predictor: inference.Predictor) -> inference.Predictor:
    """The model with its weights read as is fastest; its tokens are the same."""
    options = reading.to_try(predictor)
    if not options:
      return predictor
    progress = self._step(READ)
    for number, option in enumerate(options):
      told = choose_lib.part(progress, number / len(options), (number + 1) / len(options))
      found = self.folder.cache.get(
        reading.Reading,
        option,
        {"model": predictor.parameters_digest, "options": repr(predictor.options)},
        lambda model=predictor, option=option, told=told: reading.measure(
          model, option, self.splits.validation, told
        ),
      )
      self.listener.say(str(found))
      predictor = reading.with_option(predictor, option) if found.pays else predictor
    return predictor

  def _choose(self, predictor: inference.Predictor) -> choose_lib.Choice:
    progress = self._step(CHOOSE)
    choice = self.folder.cache.get(
      choose_lib.Choice,
      "choice",
      {
        "model": predictor.parameters_digest,
        **{option: getattr(predictor.options, option) for option in reading.WAYS},
      },
      lambda: choose_lib.choose(
        predictor,
        self.splits.validation,
        self.options,
        len(self.splits.calibration),
        self.folder.work / "validation",
        progress,
      ),
    )
    for line in summary.tried_lines(choice):
      self.listener.say(line)
    return choice

  def _certify(
    self, predictor, choice: choose_lib.Choice
  ) -> tuple[Calibration | None, tuple[Point, ...]]:
    """The calibration of the chosen way to leave, and its curve; None where there is none."""
    if choice.best is None:
      return None, ()
    self.ledger()  # before the rows are looked at
    calibration, cached = calibrating.certify(
      offline.in_bulk(predictor),  # of the procedure that is served
      self.splits.calibration,
      tolerance=self.options.tolerance,
      error_rate=self.options.error_rate,
      consistency=self.options.consistency,
      metric=self.options.metric,
      folder=self.folder.work / "calibration",
      progress=grid.as_shares(self._step(CERTIFY), choice.grid),
    )
    depths = choose_lib.mean_depths(cached)
    return calibration, tuple(
      Point(row.threshold, depth, row.mean, row.upper_bound, row.rejected, row.num_examples)
      for row, depth in zip(calibration.rows, depths, strict=True)
    )

  def _look(self, predictor, trained, choice, calibration: Calibration | None):
    """(the model that is served, the result, the calibration that is served)."""
    progress = self._step(LOOK)
    certified_threshold = (
      thresholds_lib.NEVER_EXIT if calibration is None else calibration.threshold
    )
    told = choose_lib.part(progress, 0.0, 0.6)
    measured = self._seconds(predictor, certified_threshold, told)
    reason = why_full_depth(choice, calibration, measured)
    threshold = thresholds_lib.NEVER_EXIT if reason else certified_threshold
    untouched = self._untouched(predictor)
    look = last_lib.look(
      predictor,
      untouched if trained else None,
      self.splits.last,
      self.options,
      threshold,
      choose_lib.part(progress, 0.6, 1.0),
    )
    if look.worse:
      reason, threshold = look.worse, thresholds_lib.NEVER_EXIT
    served = folder_lib.served(calibration, reason, measured)
    texts = [prompt.input for prompt in self.splits.last]
    verified, exact = drafts.fastest(untouched, texts, self.folder.cache)
    if reason:
      predictor = verified
    result = Result(
      model=self.model,
      sizes=str(self.splits),
      population=self.population,
      num_layers=predictor.num_layers,
      trained=trained,
      choice=choice,
      threshold=threshold,
      reason=reason,
      guarantee="" if served is None else served.guarantee,
      certified_threshold=certified_threshold,
      curve=(),
      seconds=measured,
      last=look.last,
      examples=look.examples,
      exact=exact,
    )
    return predictor, result, served

  def _untouched(self, predictor: inference.Predictor) -> inference.Predictor:
    """The model that is given, its weights read as is fastest.

    Its lengths are those that its folder states, so that its texts are the same; where it
    states none, the larger of the defaults and the rows'.
    """
    stated = options_lib.stored_options(training.folder_of(self.model))
    limits = {
      name: max(getattr(model.options, name) for model in (self.own, self.source))
      for name in ("max_input_length", "max_decode_length")
    }
    limits |= {name: stated[name] for name in limits if name in stated}
    read = {option: getattr(predictor.options, option) for option in reading.WAYS}
    given = self.source.with_options(**limits, **read)
    if self.options.train_all:
      return given
    # With the exits that were learned beside its weights: drafts come through them.
    given = given.with_options(shortlist=predictor.options.shortlist)
    return dataclasses.replace(given, config=predictor.config, params=predictor.params)

  def _seconds(self, predictor, threshold: float, progress) -> seconds.Seconds | None:
    """Of the last part at a certified threshold, measured once; None at full depth."""
    if not np.isfinite(threshold):
      return None
    return self.folder.cache.get(
      seconds.Seconds,
      "seconds",
      {"procedure": predictor.procedure.to_json(), "threshold": threshold},
      lambda: inference.seconds.measure(
        predictor,
        [prompt.input for prompt in self.splits.last],
        threshold,
        progress=progress,
      ),
    )


def why_full_depth(
  choice: choose_lib.Choice, calibration: Calibration | None, measured: seconds.Seconds | None
) -> str:
  """Why exits are not served; '' where a threshold is both certified and faster."""
  if choice.best is None:
    best = max((t.speedup for t in choice.tried if np.isfinite(t.speedup)), default=None)
    if best is None:
      return "no measure stays within the tolerance on the validation part at any threshold."
    return (
      "no way to leave that stays within the tolerance was faster on the validation part (the"
      f" best decoded x{best:.2f} as fast)."
    )
  if calibration is None:
    return "no threshold is certified."
  if not calibration.certified:  # "Nothing is certified: ..."
    return calibration.reason[:1].lower() + calibration.reason[1:]
  if measured is not None and measured.slower:
    return (
      f"threshold {calibration.threshold:g} is certified but was not faster on the last part"
      f" ({measured.slower}, the fastest of rounds in turn)."
    )
  return ""
