"""The page as data: one table of sections, each with its words, figures and
tables; headlines are sentences made from their numbers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from calm.inference.panel import number, threshold
from calm.paper import experiments, page
from calm.paper.experiments import FULL, ORACLE, Task
from calm.paper.page import (
  Column,
  Figure,
  Table,
  interval,
  percent,
  series_title,
  times,
)

_PARTS: Any = (Figure, Table, Task)
_MEAN_LAYERS = "mean decoder layers a token"


def sections(
  tasks: Sequence[Task], names: Sequence[str] = ()
) -> list[page.Section]:
  """The sections of some names in `SECTIONS`, or all that have something to
  show.
  """
  found = []
  for name in names or SECTIONS:
    title, text, make = SECTIONS[name]
    parts = (
      make(tasks)
      if name == "lengths"
      else (p for task in tasks for p in make(task))
    )
    if drawn := list(parts):
      parts = (
        [part for part in drawn if isinstance(part, kind)] for kind in _PARTS
      )
      found.append(page.Section(name, title, text, *parts))
  return found


def _table(
  task: Task, name: str, title: str, columns, entries, **options
) -> Table:
  """A table of one task, a row for each entry; `options` are other fields of
  `page.Table`.
  """
  name, title = (
    f"{name}_{task.settings.name}",
    f"{task.settings.title}: {title}",
  )
  rows = tuple(tuple(cell(entry) for _, cell in columns) for entry in entries)
  return Table(name, title, tuple(head for head, _ in columns), rows, **options)


def _points(
  task: Task, name: str, title: str, points, at: str = "threshold", note=""
) -> Table:
  """A table of points of curves, without the columns in which nothing is
  known.
  """
  columns: list[Column] = [
    ("curve", lambda p: series_title(p.name)),
    (at, lambda p: threshold(p.threshold)),
    ("prompts", lambda p: str(p.num_prompts)),
    ("layers", lambda p: number(p.layers)),
    (task.settings.metric_title, lambda p: percent(p.quality)),
    ("± s.e.", lambda p: percent(p.quality_error)),
    ("like the full model", lambda p: percent(p.similarity)),
    ("± s.e.", lambda p: percent(p.similarity_error)),
    ("same text, %", lambda p: percent(p.identical)),
    ("BLEU", lambda p: number(p.bleu, 1)),
    ("ms a prompt", lambda p: number(1e3 * p.seconds, 2)),
    ("speed-up", lambda p: times(p.speedup)),
    ("95 %", lambda p: interval(p.speedup_interval)),
  ]
  known = [
    column
    for column in columns
    if {column[1](point) for point in points} - {"–"}
  ]
  return _table(task, name, title, known, points, note=note)


def headline(task: Task) -> tuple[str, str]:
  """The speed-up of a task in a word, like `×1.90`, and its result in a
  sentence or two: of the tightest tolerance of texts that is faster than full
  depth, else of the fastest certified.
  """
  title = task.settings.title.capitalize()
  cells = [
    cell for cell in task.gains if cell.consistency == "textual" and cell.exits
  ]
  faster = [cell for cell in cells if cell.speedup > 1.0]
  tightest = min((cell.tolerance for cell in faster), default=None)
  among = [cell for cell in faster if cell.tolerance == tightest] or cells

  def speed(cell):
    return -math.inf if math.isnan(cell.speedup) else cell.speedup

  best = max(among, key=speed, default=None)
  pace = (
    ""
    if best is None
    else f"{times(best.speedup)} as fast{ends(best.speedup_interval)}"
  )
  if best is None or not best.speedup > 1.0:
    slower = pace and f"; the fastest that is certified runs {pace}"
    return "×1", (
      f"{title}: full depth serves best here, nothing faster was "
      f"certified{slower}."
    )
  remark = ""
  if best.risk_interval[0] > best.tolerance:
    remark = (
      " That is above the promise, with its whole interval: do not rely on it."
    )
  elif best.above:
    remark = " That is above the promise, by less than so few prompts can tell."
  return times(best.speedup), (
    f"{title}: decodes {pace}; drift "
    f"{best.risk:.2f}{ends(best.risk_interval)} where"
    f" {best.tolerance:g} was promised ({series_title(best.measure)}, threshold"
    f" {threshold(best.threshold)}, {len(task.unseen)} unseen prompts).{remark}"
  )


def ends(bounds: experiments.Interval) -> str:
  """Like ` (0.02 to 0.12)`, or nothing where it is unknown."""
  text = interval(bounds)
  return "" if text == "–" else f" ({text})"


# Fig. 3

_BAND = (
  "Dotted: the full model, with its 95 % interval as a band; other points "
  "are of the same"
  " prompts, so that they rise and fall with it."
)


def _tradeoff(task: Task) -> Iterator[Figure | Table]:
  """Fig. 3, one point a threshold: against layers, and against seconds where
  measured.
  """
  found = task.tradeoff
  settings = task.settings
  curves = dict(task.tradeoff.curves)
  (full,), label = (
    curves.pop(FULL),
    f"{settings.metric_title} against references",
  )

  def over_layers(axes) -> None:
    page.full_depth(axes, full)
    axes.set_xlim(0.8, task.predictor.num_layers + 0.2)

  def over_seconds(axes) -> None:
    page.full_depth(axes, full)
    axes.axvline(
      1e3 * full.seconds, color=page.INK, linewidth=0.8, linestyle=":"
    )
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)

  yield page.draw(
    f"fig3_layers_{settings.name}",
    f"{settings.title}: {settings.metric_title} by decoder layers",
    f"{found.num_prompts} validation prompts. One point a threshold; up and "
    "left is better."
    f" {_BAND}",
    (_MEAN_LAYERS, label),
    page.curve_series(curves, "layers", "quality"),
    over_layers,
  )
  yield _points(task, "fig3", "the numbers of Fig. 3", found.points)
  if not found.num_timed:
    return
  del curves[ORACLE]
  yield page.draw(
    f"fig3_seconds_{settings.name}",
    f"{settings.title}: {settings.metric_title} by decode time",
    f"The same points against time: {found.num_timed} of the prompts, each "
    "decoded alone, all"
    " settings in turn; median of the rounds. Left of the upright line is "
    "faster than the full"
    f" model (static, no confidence). {_BAND} The oracle, which runs every "
    "layer to know where"
    " it may leave, is not shown.",
    ("measured decode time a prompt, ms", label),
    page.curve_series(curves, "seconds", "quality"),
    over_seconds,
  )


# Table 2


def _gains(task: Task) -> Iterator[Table]:
  columns: list[Column] = [
    ("consistency", lambda gain: gain.consistency),
    ("δ", lambda gain: f"{gain.tolerance:g}"),
    ("measure", lambda gain: gain.measure),
    ("λ", lambda gain: threshold(gain.threshold)),
    ("risk", lambda gain: number(gain.risk, 3) + (" ▲" if gain.above else "")),
    (
      "95 %",
      lambda gain: interval(gain.risk_interval, 3) if gain.exits else "–",
    ),
    ("layers", lambda gain: number(gain.layers)),
    ("FLOPs", lambda gain: times(gain.flops_reduction)),
    ("decode", lambda gain: times(gain.speedup)),
    (
      "95 %",
      lambda gain: interval(gain.speedup_interval) if gain.exits else "–",
    ),
    ("total", lambda gain: times(gain.end_to_end)),
  ]
  for method in ("auto", "paper"):
    cells = [gain for gain in task.gains if gain.method == method]
    unseen = len(task.unseen)
    above = sum(gain.above for gain in cells)
    note = (
      f"{task.num_calibration} calibration prompts, {unseen} unseen ones; ε ="
      f" {task.options.error_rate:g} in every cell by itself; losses from"
      f" {task.settings.metric_title}."
      " λ: the calibrated threshold; “never”: nothing was certified, so the "
      "full model serves."
      " FLOPs: of the full model over these, decoder only (calm.t5.costs). "
      "Decode, total: the"
      " full model's seconds over these, without and with the encoder, "
      "measured on at most"
      f" {2 * task.options.timed} unseen prompts, each decoded alone. 95 %: "
      "intervals from"
      " these prompts alone (risk: a betting test on both sides; decode: "
      "prompts drawn with"
      f" replacement). ▲: {above} of {len(cells)} measured risks are above "
      "their δ; the promise"
      f" is of the expected loss, and a mean over {unseen} prompts may lie "
      "above it."
    )
    name = "table2" if method == "auto" else f"table2_{method}"
    options = {"note": note, "text_columns": 3}
    yield _table(
      task, name, f"Table 2, method {method}", columns, cells, **options
    )


# App. B


def _validity(task: Task) -> Iterator[Figure | Table]:
  columns: list[Column] = [
    ("measure", lambda trial: trial.measure),
    ("method", lambda trial: trial.method),
    ("δ", lambda trial: f"{trial.tolerance:g}"),
    ("risk", lambda trial: number(trial.risk_mean, 3)),
    ("± s.d.", lambda trial: number(trial.risk_spread, 3)),
    ("layers", lambda trial: number(trial.layers_mean)),
    ("± s.d.", lambda trial: number(trial.layers_spread)),
    ("certified, %", lambda trial: percent(trial.certified_share, 0)),
    ("violations, %", lambda trial: percent(trial.share)),
    ("95 % interval", lambda trial: " - ".join(map(percent, trial.interval))),
  ]
  note = (
    "Violations: of draws from a known pool; the others: of 50 splits, 80 / 20."
  )
  yield from _validity_figures(task)
  title = "risk, layers and violations per δ"
  options = {"note": note, "text_columns": 2}
  yield _table(task, "validity", title, columns, task.validity, **options)


def _validity_figures(task: Task) -> Iterator[Figure]:
  """Figure (a): mean and spread of the risk on the test part; (b): share of
  violations.
  """
  settings = task.settings
  rate = task.options.error_rate
  shown = [t for t in task.validity if t.method == "auto"]
  drawn = []
  broken_shares = []
  for turn, name in enumerate(task.measures):
    trials = [trial for trial in shown if trial.measure == name]
    deltas = [t.tolerance for t in trials]
    means = [t.risk_mean for t in trials]
    bars = [
      (t.risk_mean - t.risk_spread, t.risk_mean + t.risk_spread) for t in trials
    ]
    drawn.append(page.Series(name, deltas, means, bars))
    # or bars would cover each other
    shift = 0.004 * (turn - (len(task.measures) - 1) / 2)
    moved = [delta + shift for delta in deltas]
    broken = [100 * t.share for t in trials]
    bars = [(100 * t.interval[0], 100 * t.interval[1]) for t in trials]
    broken_shares.append(
      page.Series(name, moved, broken, bars, {"linestyle": "none"})
    )
  line = [0, max(trial.tolerance for trial in shown)]

  def allowed(axes) -> None:
    axes.axhline(100 * rate, color=page.INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)

  yield page.draw(
    f"validity_risk_{settings.name}",
    f"{settings.title}: risk by tolerance",
    f"{len(task.test)} prompts, textual consistency, method auto. Bars: "
    "standard deviation over"
    " 50 splits, which is partly the test part's own noise.",
    ("tolerance δ", "risk on the test part"),
    drawn,
    lambda axes: axes.plot(
      line, line, color=page.INK, linewidth=0.8, linestyle=":"
    ),
  )
  yield page.draw(
    f"validity_share_{settings.name}",
    f"{settings.title}: broken promises by tolerance",
    f"{shown[0].draws} calibration sets of {min(300, len(task.test))} "
    "prompts, method auto."
    " Dotted: ε. The promise fails by chance in at most that share.",
    ("tolerance δ", "violations, % of the draws"),
    broken_shares,
    allowed,
  )


# Section 3.3.1


def _oracles(task: Task) -> Iterator[Table]:
  note = (
    "The oracle leaves at the first layer whose first choice is the last "
    "layer's, so that only"
    " what the skipped layers store can change the text: dʲ (exit_state), d¹ "
    "always"
    " (first_state), Kʲ and Vʲ copied (copy_projections). Paper, ROUGE-L on "
    "CNN/DM at 1.53 of 8"
    " layers: 38.24, 38.31 and 23.02; the full model 38.32."
  )
  title = "what skipped layers store"
  points = task.propagations.points
  yield _points(task, "propagation", title, points, note=note)


# Fig. 2a


def _perturbations(task: Task) -> Iterator[Figure | Table]:
  settings = task.settings
  series = []
  kinds = dict(task.perturbations.curves)
  del kinds[experiments.UNPERTURBED]
  for turn, name in enumerate(kinds):
    values = [100 * point.similarity for point in kinds[name]]
    errors = [100 * point.similarity_error for point in kinds[name]]
    # Shifted, or bars would hide bars.
    positions = [point.threshold + 1 + 0.08 * turn for point in kinds[name]]
    ends = list(map(experiments.normal_interval, values, errors))
    series.append(page.Series(name, positions, values, ends))
  yield page.draw(
    f"fig2a_{settings.name}",
    f"{settings.title}: similarity by the position of a wrong token",
    f"{task.perturbations.num_prompts} validation prompts; fewer at later "
    "positions (see the"
    " table). Bars are 95 % intervals.",
    (
      "position of the replaced token",
      f"{settings.metric_title}, to the unperturbed text",
    ),
    series,
    lambda axes: axes.set_ylim(top=101),
  )
  title = "the numbers of Fig. 2a"
  points = task.perturbations.points
  yield _points(task, "fig2a", title, points, "position, from 0")


# Fig. 2b and 2c


def _schedules(task: Task) -> Iterator[Figure | Table]:
  found = task.decay
  settings = task.settings
  length = task.settings.max_decode_length
  values = experiments.schedule_values(length)
  every = {"markevery": max(1, length // 8)}
  yield page.draw(
    f"fig2b_{settings.name}",
    f"{settings.title}: the threshold of each token, λ = "
    f"{experiments.SHOWN_THRESHOLD:g}",
    f"Eq. 5 over N = {length} tokens.",
    ("token", "its threshold"),
    [
      page.Series(n, range(length), values[n].tolist(), None, every)
      for n in values
    ],
    lambda axes: axes.set_ylim(0.6, 1.0),
  )
  yield page.draw(
    f"fig2c_{settings.name}",
    f"{settings.title}: similarity by decoder layers",
    f"{found.num_prompts} validation prompts, measure {task.measures[0]}, λ "
    "in steps of"
    f" {task.options.step:g}.",
    (_MEAN_LAYERS, f"{settings.metric_title}, to the full model's text"),
    page.curve_series(found.curves, "layers", "similarity"),
  )
  yield _points(task, "fig2c", "the numbers of Fig. 2c", found.points)


# App. D and Eq. 6


def _trainings(task: Task) -> Iterator[Figure]:
  for kind, title in (
    ("classifiers", "exit classifiers"),
    ("objectives", "Eq. 6"),
  ):
    found = getattr(task, kind)
    settings = task.settings
    if found is None:
      continue
    error = max(point.quality_error for point in found.points)
    yield page.draw(
      f"{kind}_{settings.name}",
      f"{settings.title}: {title}, {settings.metric_title} by decoder layers",
      f"{found.num_prompts} validation prompts, the same for both; a point's "
      "standard error"
      f" is at most {100 * error:.1f}.",
      (_MEAN_LAYERS, f"{settings.metric_title} against references"),
      page.curve_series(found.curves, "layers", "quality"),
    )


# Table 1


def _lengths(tasks: Sequence[Task]) -> Iterator[Table]:
  heads = (
    "task",
    "prompts",
    "references",
    "full model's outputs",
    "inputs",
    "inputs cut, %",
  )
  rows = [
    (s.title, *task.lengths, s.stands_for or "–", s.paper_length or "–")
    for task in tasks
    for s in [task.settings]
  ]
  note = "Tokens of the model's own vocabulary: mean (5th - 95th percentile)."
  yield Table(
    "table1", "Table 1", (*heads, "paper's task", "paper"), tuple(rows), note
  )


# Name -> (title, text, task -> figures, tables and panels), in the order of
# reading; the lengths are a table of all tasks.
SECTIONS: dict[str, tuple[str, str, Callable[[Any], Iterable]]] = {
  "tradeoff": (
    "Quality against cost (Fig. 3)",
    "Every confidence measure over its grid of thresholds, beside models "
    "that always run the"
    " same number of layers (static) and the oracle, which leaves at the "
    "first layer that"
    " already says what the last one will. Layers are the paper's axis; "
    "seconds are what a"
    " user pays.",
    _tradeoff,
  ),
  "gains": (
    "Calibrated gains (Table 2)",
    "The threshold is calibrated on one part of the test split and "
    "everything else is"
    " measured on the other, which no choice has seen. Textual: the loss is "
    "the distance to"
    " the full model's text. Risk: the increase of the loss against "
    "references. Method"
    " “paper” tests with Hoeffding-Bentkus, for risk on losses clipped at 0 "
    "(Eq. 11);"
    " “auto” tests by betting, for risk on the signed losses of Eq. 2.",
    _gains,
  ),
  "outputs": (
    "Outputs, token by token (Fig. 4)",
    "Every token on the colour of the decoder layers that it took. Drag the "
    "tolerance: more of"
    " it lets tokens leave earlier, until the text changes. Each tolerance "
    "is a promise by"
    " itself, kept where it was chosen before looking. D is the distance to "
    "the full model's"
    " text, R the change of the loss against the reference (negative: better "
    "than the full"
    " model).",
    lambda task: [task],
  ),
  "validity": (
    "Does the promise hold? (App. B)",
    "Risk stays below the tolerance, the dotted line, by as much as the test "
    "of the threshold"
    " is cautious. Violations: calibration sets drawn with replacement, so "
    "that the true risk"
    " is known. The share of sets whose threshold breaks the tolerance must "
    "not exceed ε.",
    _validity,
  ),
  "oracles": ("State propagation (section 3.3.1)", "", _oracles),
  "perturbations": (
    "One wrong token (Fig. 2a)",
    "One token of an output is replaced, by the last layer's 10th choice "
    "(sampling-based) or"
    " by the first layer's own choice (layer-based), and decoding goes on at "
    "full depth. Only"
    " outputs that have a token at that position count.",
    _perturbations,
  ),
  "schedules": (
    "Decaying thresholds (Fig. 2b, 2c)",
    "The threshold that each token has to clear, and what it buys. Eq. 5 "
    "with τ = 0 is 0.9 λ"
    " + 0.1 for every token, which is another thing than the constant λ: the "
    "same trade-off"
    " at other values of λ.",
    _schedules,
  ),
  "trainings": (
    "Trainings side by side (App. D, Eq. 6)",
    "The exit classifier trained per layer or in Elbayad's geometric-like "
    "way, over its grid;"
    " and a model trained on every layer (Eq. 6) or on the last one only, "
    "cut at each depth.",
    _trainings,
  ),
  "lengths": ("Lengths (Table 1)", "", _lengths),
}
