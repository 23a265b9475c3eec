"""From a T5 and rows to a folder that serves early exits under a promise."""

import contextlib
import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import arguments, checkpoints, exits, inference, storage
from calm.calibrate import (
  Calibration,
  Prompt,
  Record,
  generations,
  ledger,
  losses,
  metrics,
  thresholds,
)
from calm.console import Progress, Report, print_text, quiet
from calm.data import prompt_batches
from calm.fitting import candidates, choose, exit_maps, train
from calm.fitting import request as request_lib
from calm.fitting import result as result_lib
from calm.fitting.choose import part
from calm.fitting.request import FitOptions
from calm.inference import certified, grid, panel, result_cache, timing
from calm.inference import options as options_lib
from calm.t5 import parameters

# Rows whose texts exits are learned from, and that are decoded together; rank of learned
# propagation; examples on the page.
MOST_ROWS, TEXTS_BATCH, RANK, EXAMPLES = 2000, 64, 16, 6
NEVER = thresholds.NEVER_EXIT


@dataclasses.dataclass(frozen=True)
class Listener:
  """Callbacks of a fit; the default is silent.

  Attributes:
    say: called with a sentence.
    step: called with the title of a step; returns its progress callback (share, text).
  """

  say: Callable[[str], None] = lambda text: None
  step: Callable[[str], Report] = lambda title: lambda share, text: None


@contextlib.contextmanager
def on_screen(console: rich_console.Console) -> Iterator[Listener]:
  """A listener that prints sentences and draws the step's progress with its remaining time."""
  show = lambda text: print_text(console, text, soft_wrap=True)
  with Progress(console) as progress:

    def step(title: str) -> Report:
      show(f"{title} ...")
      progress.restart(title)
      return progress

    yield Listener(say=show, step=step)
    progress(1.0, "done")


@arguments.checked()
def fit(
  model: str | pathlib.Path,
  train: str | pathlib.Path | request_lib.Rows,
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
    The model in `output`, under its promise. Where no threshold is both certified and faster:
    the given model at full depth, its weights untouched.

  Raises:
    ValueError: invalid rows or options (before any work), or an `output` of another request.
    OSError: `output` cannot be written, or another process fits in it.
  """
  asked = FitOptions(tolerance=tolerance, **options)
  with contextlib.ExitStack() as stack:
    if listener is None:
      console = rich_console.Console(stderr=True, highlight=False)
      listener = stack.enter_context(on_screen(console))
    stack.enter_context(quiet())
    made = Fit.open(str(model), train, pathlib.Path(output), asked, listener)
    stack.enter_context(storage.lock(output))
    return made.run()


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fit at work; see `fit`."""

  source: inference.Predictor  # the given model under the rows' prefix and limits
  # The same with the lengths that its folder states, so that its texts are the same; where it
  # states none, the larger of the defaults and the rows'.
  given: inference.Predictor
  initial: pathlib.Path  # its folder
  splits: request_lib.Splits
  output: pathlib.Path
  options: FitOptions
  listener: Listener
  population: str = ""  # what the promise is about, and other calibrations on these rows

  @property
  def work(self) -> pathlib.Path:
    """Training runs, generations and results: a stopped run resumes from them."""
    return result_lib.work_of(self.output)

  @property
  def cache(self) -> result_cache.ResultCache:
    """Results of finished steps."""
    return result_cache.ResultCache(self.work / "results")

  @classmethod
  def open(
    cls,
    model: str,
    rows: str | pathlib.Path | request_lib.Rows,
    output: pathlib.Path,
    options: FitOptions,
    listener: Listener,
  ) -> "Fit":
    """Finds everything that may be wrong before any work."""
    prompts = request_lib.read_rows(rows, options)
    metrics.get_metric(options.metric)(prompts[0].input, (prompts[0].input,))
    splits = request_lib.split(
      prompts,
      trains=options.train_all or options.learns_exits,
      tolerance=options.tolerance,
      error_rate=options.error_rate,
      lower=losses.kind_support(options.kind, options.metric).lower,
      seed=options.seed,
    )
    initial = inference.PACKED if model == "packed" else pathlib.Path(model)
    with warnings.catch_warnings():
      if options.stages != "none":  # exits are about to be learned
        warnings.simplefilter("ignore", inference.UntrainedExits)
      own = inference.load(model, void_guarantee=True)
    limits, cut = request_lib.length_limits(own, prompts, options.prefix)
    source = own.with_options(batch_size=options.batch_size, **limits)
    lengths = {
      name: max(getattr(own.options, name), getattr(source.options, name))
      for name in ("max_input_length", "max_decode_length")
    }
    stated = options_lib.stored_options(initial)
    lengths |= {name: stated[name] for name in lengths if name in stated}
    asked = dataclasses.asdict(options)
    del asked["target_key"]  # its rows say what it read
    request = {
      "model": source.parameters_digest,
      "rows": result_cache.prompts_digest(prompts),
      "options": asked,
    }
    result_lib.open_folder(output, request)
    request_lib.write(output / "splits", splits)
    longer = f" ({cut} of {len(prompts)} inputs are longer and cut at their end)" if cut else ""
    listener.say(
      f"Rows: {splits}. Prefix {limits['task_prefix']!r}; inputs of at most"
      f" {limits['max_input_length']} tokens{longer}, texts of at most"
      f" {limits['max_decode_length']}."
    )
    given = source.with_options(**lengths)
    opened = cls(source, given, initial, splits, output, options, listener)
    population = f"{splits.population} {opened._ledger(only_look=True)}".strip()
    listener.say(population)
    return dataclasses.replace(opened, population=population)

  def _ledger(self, **options: bool) -> str:
    """Records the calibration's question; returns what else was asked (`ledger.record`)."""
    asked = {name: getattr(self.options, name) for name in ("kind", "metric", "tolerance")}
    return ledger.record(
      self.work,
      {**asked, ledger.FIT: self.output.name},
      [row.input for row in self.splits.calibration],
      self.options.error_rate,
      around=(self.output, self.initial),
      **options,
    )

  def run(self) -> inference.Predictor:
    """All steps; those that an earlier run finished are taken from its folder."""
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", prompt_batches.CutPrompts)  # said when it was opened
      self._make()
    return inference.load(self.output)

  def _make(self) -> None:
    learned, trained, predictor, say = None, (), self.source, self.listener.say
    if self.options.learns_exits:
      predictor, learned = self._learn_exits()
    elif self.options.train_all:
      predictor, trained = train.train_stages(
        *(self.source, self.initial, self.splits, self.output, self.options),
        *(self.cache, self.listener.step),
      )
      for stage in trained:
        say(str(stage))
      # The promise is about the given model.
      predictor = predictor.with_options(reference_digest=self.source.parameters_digest)
    if choose.has_large_head(predictor):
      progress = self.listener.step("Time the output head in 8 bits")
      given = predictor, self.splits.validation, self.cache, progress
      predictor, found = choose.fastest_head(*given)
      say(found)
    choice = self._choose(predictor)
    calibration, curve, promised = None, (), ()
    if choice.best is not None:
      ways = choice.best.candidate.options(predictor.options.max_decode_length)
      predictor = predictor.with_options(**ways, grid=choice.grid)
      calibration, curve, promised = self._certify(predictor)
    result, served = self._look(predictor, choice, calibration, promised)
    result = dataclasses.replace(result, trained=trained, learned=learned, curve=curve)
    if served is None:
      predictor = self._untouched(predictor)
    result_lib.write(self.output, self.initial, predictor, result, served, self.options)
    say(result.headline(self.options))
    if served is not None:
      say(self.population)

  def _untouched(self, predictor: inference.Predictor) -> inference.Predictor:
    """The given model, with the exits that were learned beside its weights."""
    given = self.given.with_options(head_dtype=predictor.options.head_dtype)
    if self.options.train_all:
      return given
    given = given.with_options(shortlist=predictor.options.shortlist)
    return dataclasses.replace(given, config=predictor.config, params=predictor.params)

  def _look(
    self,
    predictor: inference.Predictor,
    choice: choose.Choice,
    calibration: Calibration | None,
    promised: tuple[tuple[float, int], ...],
  ) -> tuple[result_lib.Result, Calibration | None]:
    """The result, and the calibration that is served; None where full depth is."""
    progress = self.listener.step("Look at the last part")
    measured = None
    if calibration is not None and np.isfinite(calibration.threshold):
      texts, level = [row.input for row in self.splits.last], calibration.threshold
      key = {"procedure": predictor.procedure.to_json(), "threshold": level}
      told = part(progress, 0.0, 0.6)
      measure = lambda: timing.beside_full_depth(predictor, texts, level, progress=told)
      measured = self.cache.get(timing.Seconds, "seconds", key, measure)
    reason = why_full_depth(choice, calibration, measured)
    served = None
    if calibration is not None and not reason:
      served = timing.note(calibration, measured)
    threshold = NEVER if served is None else served.threshold
    last, full = evaluate(
      predictor,
      self.source if self.options.train_all else predictor.reference,
      self.splits.last,
      self.options,
      threshold,
      part(progress, 0.6, 0.9),
    )
    shown = self._panel(predictor, full, promised, part(progress, 0.9, 1.0))
    untouched = self._untouched(predictor)
    result = result_lib.Result(
      model=str(self.initial),
      sizes=str(self.splits),
      population=self.population,
      num_layers=predictor.num_layers,
      choice=choice,
      threshold=threshold,
      reason=reason,
      guarantee="" if served is None else served.guarantee,
      certified_threshold=NEVER if calibration is None else calibration.threshold,
      seconds=measured,
      last=last,
      panel=shown,
      exact=choose.faster_exact(untouched, self.splits.last, self.cache),
    )
    return result, served

  def _learn_exits(self) -> tuple[inference.Predictor, exit_maps.LearnedExits]:
    """The model with exits beside its weights, and the report on them."""
    rows = self.splits.train[:MOST_ROWS]
    told = self.listener.step(choose.DECODE_TEXTS)
    bulk = self.source.with_options(batch_size=TEXTS_BATCH)
    texts = choose.full_texts(bulk, rows, self.cache, told)
    tokens = [record.tokens or () for record in texts]
    progress = self.listener.step("Learn exits beside the frozen weights")
    file, source = self.work / checkpoints.EXITS, self.source
    if source.options.shortlist is None:
      listed = exit_maps.shortlist(tokens, source.vocabulary.vocab_size)
      source = source.with_options(shortlist=listed)
    base = parameters.base_digest(source.params)

    def learn() -> exit_maps.LearnedExits:
      maps, report = exit_maps.fit(
        source,
        [row.input for row in rows],
        tokens,
        candidates.exit_layers(source.num_layers),
        rank=RANK,
        listed=source.options.shortlist,
        seed=self.options.seed,
        progress=progress,
      )
      checkpoints.save_exits(file, maps, base)
      return report

    # The file is written first: a report without it was never stored.
    learned = self.cache.get(exit_maps.LearnedExits, "exits", {"base": base}, learn)
    self.listener.say(str(learned))
    return source.with_exits(file), learned

  def _choose(self, predictor: inference.Predictor) -> choose.Choice:
    progress = self.listener.step("Choose measure, layers and grid")
    key = {"model": predictor.parameters_digest, "head": predictor.options.head_dtype}
    make = lambda: choose.choose(
      predictor,
      self.splits.validation,
      self.options,
      len(self.splits.calibration),
      self.work / "validation",
      self.source if self.options.train_all else None,
      progress,
    )
    choice = self.cache.get(choose.Choice, "chosen", key, make)
    for line in choice.lines():
      self.listener.say(line)
    return choice

  def _panel(
    self,
    predictor: inference.Predictor,
    full: Sequence[Record],
    promised: tuple[tuple[float, int], ...],
    progress: Report,
  ) -> panel.Panel:
    """Some prompts of the last part at every threshold of the grid that was certified on."""
    options, prompts, columns = self.options, self.splits.last[:EXAMPLES], [full[:EXAMPLES]]
    levels: tuple[float, ...] = ()
    if promised:
      levels = tuple(certified.default_grid(predictor.options))
      model = grid.in_bulk(predictor)
      with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        made = grid.on_grid(model, prompts, levels, path, full=columns[0], progress=progress)
        columns += made.records
    eos_id, piece = predictor.eos_id, predictor.vocabulary.piece
    items = (
      panel.shown_prompt(prompt, records, piece, options.metric, eos_id)
      for prompt, *records in zip(prompts, *columns, strict=False)
    )
    promised = promised or ((options.tolerance, 0),)
    return panel.Panel(
      predictor.options.measure,
      predictor.num_layers,
      (NEVER, *levels),
      tuple(items),
      options.error_rate,
      promised,
      first=[tolerance for tolerance, _ in promised].index(options.tolerance),
      loss="mean distance" if options.kind == "textual" else "mean increase of the loss",
    )

  def _certify(
    self, predictor: inference.Predictor
  ) -> tuple[Calibration, tuple[result_lib.Point, ...], tuple[tuple[float, int], ...]]:
    """The calibration of the chosen candidate, its curve, and what other tolerances certify."""
    self._ledger()  # before the rows are looked at
    rows, full = self.splits.calibration, None
    if self.options.train_all:
      full = grid.with_rule(grid.in_bulk(self.source), rows, exits.StaticExit())
    progress = self.listener.step("Certify the threshold")
    calibration, cached = certified.certify(
      grid.in_bulk(predictor),  # of the procedure that is served
      rows,
      tolerance=self.options.tolerance,
      error_rate=self.options.error_rate,
      consistency=self.options.consistency,
      metric=self.options.metric,
      folder=self.work / "calibration",
      full=full,
      progress=progress,
    )
    layers = map(grid.mean_layers, cached.records)
    curve = tuple(
      result_lib.Point(row.threshold, depth, row.mean, row.upper_bound, row.rejected)
      for row, depth in zip(calibration.rows, layers, strict=True)
    )
    lost = losses.compute(cached, self.options.kind, metric=self.options.metric)
    asked = (*panel.TOLERANCES, self.options.tolerance)
    return calibration, curve, panel.promised(lost, self.options.error_rate, asked)


def why_full_depth(
  choice: choose.Choice, calibration: Calibration | None, measured: timing.Seconds | None
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
  assert calibration is not None  # there is a best
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
  reference: inference.Predictor,
  prompts: Sequence[Prompt],
  options: FitOptions,
  threshold: float,
  progress: Report,
) -> tuple[result_lib.LastLook, Sequence[Record]]:
  """The numbers of the last part at full depth and under the threshold, and its full texts.

  The promise is about the full-depth texts of `reference`; `predictor` has the options that are
  certified.
  """
  # The batches that certified: their programs are compiled.
  told, static = part(progress, 0.0, 0.5), exits.StaticExit()
  full = grid.with_rule(grid.in_bulk(reference), prompts, static, progress=told)
  early, early_quality, risk = full, None, None
  if np.isfinite(threshold):
    told, model = part(progress, 0.5, 1.0), grid.in_bulk(predictor)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      made = grid.on_grid(model, prompts, (threshold,), path, full=full, progress=told)
    early = made.records[0]
    early_quality = quality(early, prompts, options.metric)
    pair = generations.Generations(tuple(prompts), np.array([0.5]), (early,), tuple(full))
    metric = metrics.get_metric(options.metric)
    risk = mean(losses.prefix_losses(pair, options.kind, metric=metric)[0])
  full_quality, layers = quality(full, prompts, options.metric), grid.mean_layers(early)
  return result_lib.LastLook(full_quality, early_quality, risk, layers), full


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
