"""From a T5 and rows to a folder that serves early exits under a promise."""

import contextlib
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import console as rich_console

from calm import arguments, checkpoints, exits, inference, storage
from calm.calibrate import (
  NEVER_EXIT,
  Calibration,
  Record,
  generations,
  losses,
  metrics,
)
from calm.console import Progress, Report, print_text
from calm.data import prompt_batches
from calm.fitting import choose, exit_maps, request, train
from calm.fitting import result as result_lib
from calm.fitting.request import Fit, FitOptions
from calm.inference import grid, outputs, panel, timing
from calm.inference import options as options_lib
from calm.inference.grid import part
from calm.t5 import parameters

# Rows whose texts exits are learned from, and that are decoded together; rank
# of learned propagation; examples on the page.
MOST_ROWS = 2000
TEXTS_BATCH = 64
RANK = 16
EXAMPLES = 6


@arguments.checked()
def fit(
  model: str | pathlib.Path,
  train: str | pathlib.Path | request.Rows,
  *,
  output: str | pathlib.Path,
  tolerance: float = 0.1,
  console: rich_console.Console | None = None,
  **options: Any,
) -> inference.Predictor:
  """Learns exits, chooses how to leave, certifies a threshold, and writes one
  folder.

  The rows are split by group; nothing is chosen on the prompts that certify,
  and the last part is evaluated once, in the end. A stopped run resumes when it
  is called again.

  Args:
    model: a checkpoint folder of any known format, or 'packed'.
    train: rows of {input, target, source}: a file of any format of `calm infer`
      (JSON Lines, a JSON array, CSV, TSV, Parquet), a DataFrame with such
      columns, or `Prompt`s.
    output: the folder to write; a run of the same request in it resumes.
    tolerance: delta, in (0, 1).
    console: shows sentences and progress, as `calm fit` does; None is standard
      error, `rich.console.Console(quiet=True)` shows nothing.
    **options: fields of `FitOptions`.

  Returns:
    The model in `output`, under its promise. Where no threshold is both
    certified and faster: the given model at full depth, its weights untouched.

  Raises:
    ValueError: invalid rows or options (before any work), or an `output` of
      another request.
    OSError: `output` cannot be written, or another process fits in it.
  """
  asked = FitOptions(tolerance=tolerance, **options)
  with contextlib.ExitStack() as stack:
    console = console or rich_console.Console(stderr=True, highlight=False)
    say = functools.partial(print_text, console, soft_wrap=True)
    step = stack.enter_context(Progress(console)).step
    begun = begin(str(model), train, pathlib.Path(output), asked, say, step)
    stack.enter_context(storage.lock(output))
    with warnings.catch_warnings():
      # said when it began
      warnings.simplefilter("ignore", prompt_batches.CutPrompts)
      if not (begun.work / result_lib.RESULT).is_file():
        make(begun)
    return inference.load(output)


def begin(
  model: str,
  rows: str | pathlib.Path | request.Rows,
  output: pathlib.Path,
  options: FitOptions,
  say: Callable[[str], object],
  step: Callable[[str], Report],
) -> Fit:
  """Finds everything that may be wrong before any work."""
  prompts = request.read_rows(rows, options)
  metrics.get_metric(options.metric)(prompts[0].input, (prompts[0].input,))
  splits = request.split(
    prompts, options, options.train_all or options.learns_exits
  )
  initial = inference.PACKED if model == "packed" else pathlib.Path(model)
  with warnings.catch_warnings():
    if options.stages != "none":  # exits are about to be learned
      warnings.simplefilter("ignore", inference.UntrainedExits)
    own = inference.load(model, void_guarantee=True)
  limits, cut = request.length_limits(own, prompts, options.prefix)
  source = own.with_options(batch_size=options.batch_size, **limits)
  stated = options_lib.stored_options(initial)
  lengths = {
    name: stated.get(
      name, max(getattr(own.options, name), getattr(source.options, name))
    )
    for name in ("max_input_length", "max_decode_length")
  }
  asked = dataclasses.asdict(options)
  del asked["target_key"]  # its rows say what it read
  digest = storage.prompts_digest(prompts)
  whole = {"model": source.parameters_digest, "rows": digest, "options": asked}
  result_lib.open_folder(output, whole)
  request.write(output / "splits", splits)
  longer = (
    f" ({cut} of {len(prompts)} inputs are longer and cut at their end)"
    if cut
    else ""
  )
  given = source.with_options(**lengths)
  say(
    f"Rows: {splits}. Prefix {limits['task_prefix']!r}; inputs of at most"
    f" {limits['max_input_length']} tokens{longer}, texts of at most"
    f" {limits['max_decode_length']}."
  )
  say(splits.population)
  return Fit(source, given, initial, splits, output, options, say, step)


def make(fit: Fit) -> None:
  """All steps; those that an earlier run finished are taken from its folder."""
  learned = None
  trained = ()
  predictor = fit.source
  say = fit.say
  if fit.options.learns_exits:
    predictor, learned = learn_exits(fit)
  elif fit.options.train_all:
    predictor, trained = train.train_stages(fit)
    for stage in trained:
      say(str(stage))
    # The promise is about the given model.
    predictor = predictor.with_options(
      reference_digest=fit.source.parameters_digest
    )
  predictor = choose.fastest_head(fit, predictor)
  progress = fit.step("Choose measure, layers and grid")
  key = {
    "model": predictor.parameters_digest,
    "head": predictor.options.head_dtype,
  }

  def compute():
    return choose.choose(fit, predictor, progress)

  choice = storage.cached(fit.results, choose.Choice, "chosen", key, compute)
  for line in choice.lines():
    say(line)
  calibration = None
  promised = ((fit.options.tolerance, 0),)
  if choice.best is not None:
    predictor = choice.best.candidate.applied(predictor).with_options(
      grid=choice.grid
    )
    calibration, promised = certify(fit, predictor)
  result, served = look(fit, predictor, choice, calibration, promised)
  result = dataclasses.replace(result, trained=trained, learned=learned)
  if served is None:
    predictor = untouched(fit, predictor)
  result_lib.write(fit, predictor, result, served)
  say(result.headline(fit.options))
  if served is not None:
    say(fit.splits.population)


def untouched(fit: Fit, predictor: inference.Predictor) -> inference.Predictor:
  """The given model, with the exits that were learned beside its weights."""
  given = fit.given.with_options(head_dtype=predictor.options.head_dtype)
  if fit.options.train_all:
    return given
  given = given.with_options(shortlist=predictor.options.shortlist)
  return dataclasses.replace(
    given, config=predictor.config, params=predictor.params
  )


def learn_exits(fit: Fit) -> tuple[inference.Predictor, exit_maps.LearnedExits]:
  """The model with exits beside its weights, and the report on them."""
  rows = fit.splits.train[:MOST_ROWS]
  source = fit.source
  told = fit.step(choose.DECODE_TEXTS)
  bulk = source.with_options(batch_size=TEXTS_BATCH)
  tokens = [
    r.tokens or () for r in choose.full_texts(bulk, rows, fit.results, told)
  ]
  progress = fit.step("Learn exits beside the frozen weights")
  file = fit.work / checkpoints.EXITS
  base = parameters.base_digest(source.params)
  if source.options.shortlist is None:
    listed = exit_maps.shortlist(tokens, source.vocabulary.vocab_size)
    source = source.with_options(shortlist=listed)

  def learn() -> exit_maps.LearnedExits:
    maps, report = exit_maps.fit(
      source,
      [row.input for row in rows],
      tokens,
      choose.exit_layers(source.num_layers),
      rank=RANK,
      seed=fit.options.seed,
      progress=progress,
    )
    checkpoints.save_exits(file, maps, base)
    return report

  # The file is written first: a report without it was never stored.
  kind = exit_maps.LearnedExits
  key = {"base": base}
  learned = storage.cached(fit.results, kind, "exits", key, learn)
  fit.say(str(learned))
  config, params = checkpoints.with_exits(source.config, source.params, file)
  return dataclasses.replace(source, config=config, params=params), learned


def certify(
  fit: Fit, predictor: inference.Predictor
) -> tuple[Calibration, tuple[tuple[float, int], ...]]:
  """The calibration of the chosen candidate, and what other tolerances
  certify.
  """
  rows = fit.splits.calibration
  full = None
  options = fit.options
  if options.train_all:
    full = grid.with_rule(grid.in_bulk(fit.source), rows, exits.StaticExit())
  calibration, cached = grid.certify(
    grid.in_bulk(predictor),  # of the procedure that is served
    rows,
    tolerance=options.tolerance,
    error_rate=options.error_rate,
    consistency=options.consistency,
    metric=options.metric,
    folder=fit.work / "calibration",
    full=full,
    progress=fit.step("Certify the threshold"),
  )
  lost = losses.compute(cached, options.kind, metric=options.metric)
  asked = (*panel.TOLERANCES, options.tolerance)
  return calibration, panel.promised(lost, options.error_rate, asked)


def why_full_depth(
  choice: choose.Choice,
  calibration: Calibration | None,
  measured: timing.Seconds | None,
) -> str:
  """Why exits are not served; '' where a threshold is both certified and
  faster.
  """
  if choice.best is None:
    best = max(
      (t.speedup for t in choice.tried if np.isfinite(t.speedup)), default=None
    )
    if best is None:
      return (
        "no measure stays within the tolerance on the validation part at any "
        "threshold."
      )
    return (
      "no way to leave that stays within the tolerance was faster on the "
      "validation part (the"
      f" best decoded x{best:.2f} as fast)."
    )
  assert calibration is not None  # there is a best
  if not calibration.certified:  # "Nothing is certified: ..."
    return calibration.reason[:1].lower() + calibration.reason[1:]
  if measured is not None and measured.slower:
    return (
      f"threshold {calibration.threshold:g} is certified but was not faster "
      "on the last part"
      f" ({measured.slower}, the fastest of rounds in turn)."
    )
  return ""


# ---- The last part


def look(
  fit: Fit,
  predictor: inference.Predictor,
  choice: choose.Choice,
  calibration: Calibration | None,
  promised: tuple[tuple[float, int], ...],
) -> tuple[result_lib.Result, Calibration | None]:
  """The result, and the calibration that is served; None where full depth
  is.
  """
  progress = fit.step("Look at the last part")
  prompts = fit.splits.last
  options = fit.options
  measured = None
  served = None
  level = NEVER_EXIT if calibration is None else calibration.threshold
  if np.isfinite(level):
    texts = [row.input for row in prompts]
    told = part(progress, 0.0, 0.6)
    measured = timing.beside_full_depth(predictor, texts, level, progress=told)
  reason = why_full_depth(choice, calibration, measured)
  if calibration is not None and measured is not None and not reason:
    served = timing.note(calibration, measured)
  # The batches that certified: their programs are compiled.
  reference = grid.in_bulk(
    fit.source if options.train_all else predictor.reference
  )
  told = part(progress, 0.6, 0.8)
  full = grid.with_rule(reference, prompts, exits.StaticExit(), progress=told)
  levels = ()
  columns = (full,)
  if calibration is not None:
    levels = tuple(grid.default_grid(predictor.options))
    model = grid.in_bulk(predictor)
    told = part(progress, 0.8, 1.0)
    folder = fit.work / "last"
    columns += grid.on_grid(
      model, prompts, levels, folder, full=full, progress=told
    ).records
  early = columns[0 if served is None else 1 + levels.index(level)]
  given = predictor.vocabulary.piece, options.metric, predictor.eos_id
  shown = (
    panel.shown_prompt(prompt, records, *given)
    for prompt, *records in zip(prompts[:EXAMPLES], *columns, strict=False)
  )
  exact = choose.faster_exact(untouched(fit, predictor), prompts)
  result = result_lib.Result(
    model=str(fit.initial),
    num_layers=predictor.num_layers,
    choice=choice,
    threshold=NEVER_EXIT if served is None else level,
    reason=reason,
    guarantee="" if served is None else served.guarantee,
    certified_threshold=level,
    seconds=measured,
    last=evaluate(fit, full, early),
    panel=panel.Panel(
      predictor.options.measure,
      (NEVER_EXIT, *levels),
      tuple(shown),
      options.error_rate,
      promised,
      first=[tolerance for tolerance, _ in promised].index(options.tolerance),
    ),
    exact=exact and exact[0],
    exact_rule=exact and exact[1],
    tested=() if calibration is None else calibration.rows,
  )
  return result, served


def evaluate(
  fit: Fit, full: Sequence[Record], early: Sequence[Record]
) -> result_lib.LastLook:
  """The numbers of the last part at full depth and as it is served; the same:
  full depth.
  """
  prompts = fit.splits.last
  metric = metrics.get_metric(fit.options.metric)

  def quality(records: Sequence[Record]) -> result_lib.Mean | None:
    if not all(prompt.targets for prompt in prompts):
      return None
    pairs = [
      (r.prediction, tuple(p.targets))
      for r, p in zip(records, prompts, strict=True)
    ]
    return result_lib.Mean.of(metrics.compute(metric, pairs))

  layers = outputs.mean_layers(early)
  if early is full:
    return result_lib.LastLook(quality(full), None, None, layers)
  pair = generations.Generations(
    prompts, np.array([0.5]), (tuple(early),), tuple(full)
  )
  risk = result_lib.Mean.of(
    losses.prefix_losses(pair, fit.options.kind, metric=metric)[0]
  )
  return result_lib.LastLook(quality(full), quality(early), risk, layers)
