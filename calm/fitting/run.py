"""From a T5 and rows to a folder that serves early exits under a promise."""

import contextlib
import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import arguments, checkpoints, exits, inference, storage
from calm.calibrate import Calibration, Prompt, Record, generations, ledger, losses, metrics
from calm.calibrate import seconds as seconds_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.console import Report, quiet
from calm.data import prompt_batches
from calm.fitting import candidates, exit_maps, tokenizer_check
from calm.fitting import choose as choose_lib
from calm.fitting import result as result_lib
from calm.fitting import splits as splits_lib
from calm.fitting import train as train_lib
from calm.fitting.choose import part
from calm.fitting.options import FitOptions, Listener, on_screen
from calm.inference import certified, grid, result_cache
from calm.inference import options as options_lib
from calm.t5 import parameters

LEARN = "Learn exits beside the frozen weights"
HEAD = "Time the output head in 8 bits"
CHOOSE = "Choose measure, layers and grid"
CERTIFY = "Certify the threshold"
LOOK = "Look at the last part"
# Rows whose texts exits are learned from; rank of learned propagation; examples on the page.
MOST_ROWS, RANK, EXAMPLES = 2000, 16, 6


@arguments.checked()
def fit(
  model: str | pathlib.Path,
  train: str | pathlib.Path | splits_lib.Rows,
  *,
  output: str | pathlib.Path,
  tolerance: float = 0.1,
  listener: Listener | None = None,
  **options: Any,
) -> inference.Predictor:
  """Learns exits, chooses how to leave, certifies a threshold, and writes one folder.

  The rows are split by group; nothing is chosen on the prompts that certify, and the last part
  is evaluated once, in the end. A stopped run resumes when it is called again.

  Args:
    model: a checkpoint folder of any known format, or 'packed'.
    train: rows of {input, target, source}: a file of any format of `calm infer` (JSON Lines,
      a JSON array, CSV, TSV, Parquet), a DataFrame with such columns, or `Prompt`s.
    output: the folder to write; a run of the same request in it resumes.
    tolerance: delta, in (0, 1).
    listener: callbacks; None shows progress on standard error, as `calm fit` does. `Listener()`
      is silent.
    **options: fields of `FitOptions`.

  Returns:
    The model in `output`, under its promise. Where no threshold is both certified and faster,
    or training has made full depth worse (`FitOptions.accept_quality`): the given model at full
    depth, its weights untouched.

  Raises:
    ValueError: invalid rows or options (before any work), or an `output` of another request.
    OSError: `output` cannot be written, or another process fits in it.
  """
  wishes = FitOptions(tolerance=tolerance, **options)
  with contextlib.ExitStack() as stack:
    if listener is None:
      console = rich_console.Console(stderr=True, highlight=False)
      listener = stack.enter_context(on_screen(console))
    stack.enter_context(quiet())
    made = Fit.open(str(model), train, pathlib.Path(output), wishes, listener)
    stack.enter_context(storage.lock(output))
    return made.run()


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fit at work; see `fit`.

  Attributes:
    source: the given model under the rows' prefix and limits.
    own: the given model under its own.
    model: its folder, or 'packed'.
    splits, folder, options, listener: of the fit.
    timed: updates of the stages, timed for the budget.
    told: other calibrations on the same rows, in words.
  """

  source: inference.Predictor
  own: inference.Predictor
  model: str
  splits: splits_lib.Splits
  folder: result_lib.Folder
  options: FitOptions
  listener: Listener
  timed: Mapping[str, train_lib.Timed]
  told: str = ""

  @classmethod
  def open(
    cls,
    model: str | pathlib.Path,
    train: str | pathlib.Path | splits_lib.Rows,
    output: pathlib.Path,
    options: FitOptions,
    listener: Listener,
  ) -> "Fit":
    """Finds everything that may be wrong before any work."""
    rows = splits_lib.read_rows(train, options)
    splits = splits_lib.split(
      rows,
      trains=options.train_all or options.learns_exits,
      tolerance=options.tolerance,
      error_rate=options.error_rate,
      lower=losses.kind_support(options.kind, options.metric).lower,
      seed=options.seed,
    )
    own = open_model(model, options, listener)
    limits, cut = splits_lib.length_limits(own, rows, options.prefix)
    source = own.with_options(batch_size=options.batch_size, **limits)
    request = {
      "model": source.parameters_digest,
      "rows": result_cache.prompts_digest(rows),
      "options": options.request,
    }
    timed: dict[str, train_lib.Timed] = {}
    initial = folder_of(str(model))
    time_stages = lambda: timed.update(
      train_lib.time_stages(source, initial, splits, options, listener.say)
    )
    folder = result_lib.Folder.open(output, request, time_stages)
    splits_lib.write(output / "splits", splits)
    longer = f" ({cut} of {len(rows)} inputs are longer and cut at their end)" if cut else ""
    listener.say(
      f"Rows: {splits}. Prefix {limits['task_prefix']!r}; inputs of at most"
      f" {limits['max_input_length']} tokens{longer}, texts of at most"
      f" {limits['max_decode_length']}."
    )
    opened = cls(source, own, str(model), splits, folder, options, listener, timed)
    opened = dataclasses.replace(opened, told=opened.ledger(only_look=True))
    listener.say(opened.population)
    if strange := tokenizer_check.warning(source, rows):
      listener.say(strange)
    return opened

  @property
  def population(self) -> str:
    """The prompts that the promise is about, and other calibrations on the same rows."""
    return f"{self.splits.population} {self.told}".strip()

  def ledger(self, **options: bool) -> str:
    """Records the calibration's question; returns what else was asked (`ledger.record`)."""
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
      predictor, trained = train_lib.train_stages(
        self.source,
        folder_of(self.model),
        self.splits,
        self.folder.path,
        self.options,
        self.timed,
        self.folder.cache,
        self._step,
        self.listener.say,
      )
    if self.options.changes_weights:  # the promise is about the given model
      digest = self.source.parameters_digest
      predictor = predictor.with_options(reference_digest=digest)
    predictor = self._with_fastest_head(predictor)
    choice = self._choose(predictor)
    if choice.best is not None:
      ways = choice.best.candidate.options(predictor.options.max_decode_length)
      predictor = predictor.with_options(**ways, grid=choice.grid)
    calibration, curve = self._certify(predictor, choice)
    predictor, result, served = self._look(predictor, trained, choice, calibration)
    result = dataclasses.replace(result, curve=curve, learned=learned)
    self.folder.write(folder_of(self.model), predictor, result, served, self.options)
    self.listener.say(result.headline(self.options))
    if served is not None:
      self.listener.say(self.population)

  def _step(self, title: str) -> Report:
    """Says which of how many steps begins."""
    head = [HEAD] if choose_lib.has_large_head(self.source) else []
    learn = [train_lib.DECODE_TEXTS, LEARN] if self.options.learns_exits else []
    steps = [*learn, *train_lib.titles(self.options), *head, CHOOSE, CERTIFY, LOOK]
    return self.listener.step(f"[{steps.index(title) + 1}/{len(steps)}] {title}")

  def _learn_exits(self) -> tuple[inference.Predictor, exit_maps.LearnedExits]:
    """The model with exits beside its weights, and the report on them."""
    rows = self.splits.train[:MOST_ROWS]
    told = self._step(train_lib.DECODE_TEXTS)
    texts = train_lib.own_texts(self.source, rows, self.folder.work / "own_texts", told)
    tokens = [entry["tokens"] for entry in texts]
    progress, file = self._step(LEARN), self.folder.work / checkpoints.EXITS
    source, vocabulary = self.source, self.source.vocabulary
    if source.options.shortlist is None and not source.config.per_layer_heads:
      listed = exit_maps.shortlist(tokens, vocabulary.vocab_size)
      source = source.with_options(shortlist=listed)
    base = parameters.base_digest(self.source.params)

    def learn() -> exit_maps.LearnedExits:
      maps, report = exit_maps.fit(
        source,
        [row.input for row in rows],
        tokens,
        candidates.exit_layers(self.source.num_layers),
        rank=RANK,
        listed=source.options.shortlist,
        seed=self.options.seed,
        progress=progress,
      )
      checkpoints.save_exits(file, maps, base)
      return report

    # The file is written first: a report without it was never stored.
    learned = self.folder.cache.get(exit_maps.LearnedExits, "exits", {"base": base}, learn)
    self.listener.say(str(learned))
    return source.with_exits(file), learned

  def _with_fastest_head(self, predictor: inference.Predictor) -> inference.Predictor:
    """The model, with its output head in 8 bits where that is faster; its tokens are equal."""
    if not choose_lib.has_large_head(predictor):
      return predictor
    progress, prompts = self._step(HEAD), self.splits.validation
    key = {"model": predictor.parameters_digest, "options": repr(predictor.options)}
    found = self.folder.cache.get(
      choose_lib.HeadReading,
      "head_dtype",
      key,
      lambda: choose_lib.read_head(predictor, prompts, progress),
    )
    self.listener.say(str(found))
    return predictor.with_options(head_dtype="int8") if found.pays else predictor

  def _choose(self, predictor: inference.Predictor) -> choose_lib.Choice:
    progress = self._step(CHOOSE)
    choosing = choose_lib.Choosing(
      predictor,
      self.splits.validation,
      self.options,
      len(self.splits.calibration),
      self.folder.work / "validation",
      self.source if self.options.changes_weights else None,
    )
    key = {"model": predictor.parameters_digest, "head": predictor.options.head_dtype}
    make = lambda: choosing.run(progress)
    choice = self.folder.cache.get(choose_lib.Choice, "choice", key, make)
    for line in choice.lines():
      self.listener.say(line)
    return choice

  def _certify(
    self, predictor, choice: choose_lib.Choice
  ) -> tuple[Calibration | None, tuple[result_lib.Point, ...]]:
    """The calibration of the chosen candidate, and its curve; None where none was chosen."""
    if choice.best is None:
      return None, ()
    self.ledger()  # before the rows are looked at
    full = None
    if self.options.changes_weights:
      given = grid.in_bulk(self.source)
      full = grid.with_rule(given, self.splits.calibration, exits.StaticExit())
    calibration, cached = certified.certify(
      grid.in_bulk(predictor),  # of the procedure that is served
      self.splits.calibration,
      tolerance=self.options.tolerance,
      error_rate=self.options.error_rate,
      consistency=self.options.consistency,
      metric=self.options.metric,
      folder=self.folder.work / "calibration",
      full=full,
      progress=grid.as_shares(self._step(CERTIFY), choice.grid),
    )
    depths = map(grid.mean_layers, cached.records)
    return calibration, tuple(
      result_lib.Point(
        row.threshold, depth, row.mean, row.upper_bound, row.rejected, row.num_examples
      )
      for row, depth in zip(calibration.rows, depths, strict=True)
    )

  def _look(self, predictor, trained, choice, calibration: Calibration | None):
    """(the model that is served, the result, the calibration that is served)."""
    progress = self._step(LOOK)
    never = thresholds_lib.NEVER_EXIT
    certified_threshold = never if calibration is None else calibration.threshold
    measured = self._seconds(predictor, certified_threshold, part(progress, 0.0, 0.6))
    reason = why_full_depth(choice, calibration, measured)
    threshold = never if reason else certified_threshold
    untouched = self._untouched(predictor)
    last, examples, worse = evaluate(
      predictor,
      untouched if trained else None,
      self.splits.last,
      self.options,
      threshold,
      part(progress, 0.6, 1.0),
    )
    if worse:
      reason, threshold = worse, never
    served = None
    if calibration is not None and not reason:
      served = seconds_lib.noted(calibration, measured)
    texts = [prompt.input for prompt in self.splits.last]
    verified, exact = choose_lib.fastest_exact(untouched, texts, self.folder.cache)
    if reason:
      predictor = verified
    result = result_lib.Result(
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
      last=last,
      examples=examples,
      exact=exact,
    )
    return predictor, result, served

  def _untouched(self, predictor: inference.Predictor) -> inference.Predictor:
    """The given model, its head read as is fastest.

    Its lengths are those that its folder states, so that its texts are the same; where it
    states none, the larger of the defaults and the rows'.
    """
    stated = options_lib.stored_options(folder_of(self.model))
    limits = {
      name: max(getattr(model.options, name) for model in (self.own, self.source))
      for name in ("max_input_length", "max_decode_length")
    }
    limits |= {name: stated[name] for name in limits if name in stated}
    given = self.source.with_options(**limits, head_dtype=predictor.options.head_dtype)
    if self.options.train_all:
      return given
    # With the exits that were learned beside its weights: drafts come through them.
    given = given.with_options(shortlist=predictor.options.shortlist)
    return dataclasses.replace(given, config=predictor.config, params=predictor.params)

  def _seconds(self, predictor, threshold: float, progress) -> seconds_lib.Seconds | None:
    """Of the last part at a certified threshold, measured once; None at full depth."""
    if not np.isfinite(threshold):
      return None
    texts = [prompt.input for prompt in self.splits.last]
    key = {"procedure": predictor.procedure.to_json(), "threshold": threshold}
    measure = lambda: inference.timing.beside_full_depth(
      predictor, texts, threshold, progress=progress
    )
    return self.folder.cache.get(seconds_lib.Seconds, "seconds", key, measure)


def folder_of(model: str) -> pathlib.Path:
  """The folder of a model that is given as a folder or as 'packed'."""
  return inference.PACKED if model == "packed" else pathlib.Path(model)


def open_model(
  model: str | pathlib.Path, options: FitOptions, listener: Listener
) -> inference.Predictor:
  """The given model; says so where exits are used that may not be trained."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    source = inference.load(model, void_guarantee=True)
  for warning in caught:
    if not issubclass(warning.category, inference.UntrainedExits):
      warnings.warn_explicit(
        warning.message, warning.category, warning.filename, warning.lineno
      )
    elif not options.trains and not options.learns_exits:
      listener.say(
        f"The exits of {model} are taken for trained (stages='none'); its folder does not say"
        " so. Where they are not, full depth will be served."
      )
  return source


def why_full_depth(
  choice: choose_lib.Choice,
  calibration: Calibration | None,
  measured: seconds_lib.Seconds | None,
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


# ---- The last part


def evaluate(
  predictor: inference.Predictor,
  original: inference.Predictor | None,
  prompts: Sequence[Prompt],
  options: FitOptions,
  threshold: float,
  progress: Report,
) -> tuple[result_lib.LastLook, tuple[result_lib.ShownText, ...], str]:
  """Decodes the last part at full depth and under the threshold, once.

  Where full depth is served, or training has made it worse, the texts are the original's.

  Args:
    predictor: the model under the options that are certified.
    original: the model before training; None where nothing was trained.
    prompts: the last part.
    options: of the fit.
    threshold: served; `NEVER_EXIT` for full depth.
    progress: called with the share done.

  Returns:
    The numbers, some texts, and why the quality of the trained weights forbids to serve them
    ('' where it does not).
  """
  static = exits.StaticExit()
  # The batches that certified: their programs are compiled.
  predictor = grid.in_bulk(predictor)
  reference = grid.in_bulk(predictor.reference)
  full = grid.with_rule(reference, prompts, static, progress=part(progress, 0.0, 0.3))
  before = full
  if original is not None:
    told = part(progress, 0.3, 0.6)
    before = grid.with_rule(grid.in_bulk(original), prompts, static, progress=told)
  quality_original = quality(before, prompts, options.metric)
  quality_full = quality(full, prompts, options.metric)
  worse = "" if options.accept_quality else why_worse(quality_original, quality_full, options)
  if original is not None and (worse or not np.isfinite(threshold)):
    predictor, full, threshold = original, before, thresholds_lib.NEVER_EXIT
  early, early_quality, risk = full, None, None
  compared = before if options.changes_weights else full
  if np.isfinite(threshold):
    told, levels = part(progress, 0.6, 1.0), (threshold,)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      made = grid.on_grid(predictor, prompts, levels, path, full=compared, progress=told)
    early = made.records[0]
    early_quality = quality(early, prompts, options.metric)
    pair = generations.Generations(tuple(prompts), np.array([0.5]), (early,), tuple(compared))
    metric = metrics.get_metric(options.metric)
    risk = mean(losses.prefix_losses(pair, options.kind, metric=metric)[0])
  layers = grid.mean_layers(early)
  shown = [
    result_lib.ShownText(
      prompt=prompt.input,
      reference=prompt.targets[0] if prompt.targets else "",
      full=whole.prediction,
      text=record.prediction,
      pieces=tuple(
        "⏎" if token == predictor.eos_id else predictor.vocabulary.piece(token)
        for token in record.tokens or ()
      ),
      exit_layers=record.exit_layers or (),
      confidences=record.confidences or (),
    )
    for prompt, whole, record in zip(prompts, compared, early, strict=True)
  ]
  look = result_lib.LastLook(quality_original, quality_full, early_quality, risk, layers)
  return look, tuple(shown[:EXAMPLES]), worse


def mean(values: np.ndarray) -> result_lib.Mean:
  """Mean and 95 % interval of values, one a prompt."""
  spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
  return result_lib.Mean(float(values.mean()), 1.96 * spread / len(values) ** 0.5, len(values))


def quality(
  records: Sequence[Record], prompts: Sequence[Prompt], metric: metrics.MetricLike
) -> result_lib.Mean | None:
  """Mean metric against references; None where a prompt has none."""
  if not all(prompt.targets for prompt in prompts):
    return None
  pairs = [(r.prediction, tuple(p.targets)) for r, p in zip(records, prompts, strict=True)]
  return mean(metrics.compute(metrics.get_metric(metric), pairs))


def why_worse(
  original: result_lib.Mean | None, trained: result_lib.Mean | None, options: FitOptions
) -> str:
  """Why trained weights are not served: their quality is below the original's interval."""
  if original is None or trained is None or trained.value >= original.value - original.margin:
    return ""
  return (
    f"training made full depth worse ({options.metric} {trained} against references on the last"
    f" part, {original} before); `accept_quality` serves the trained weights all the same."
  )
