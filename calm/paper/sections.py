"""The page as data: one table of sections, each with its words, figures and tables."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from calm.exits import schedules
from calm.inference.panel import number, threshold
from calm.paper import experiments, figures, findings, scores
from calm.paper.experiments import FULL, ORACLE, TaskReport
from calm.paper.figures import INK, Figure, Series
from calm.paper.tables import (
  Column,
  Table,
  interval,
  percent,
  tabulate,
  times,
)

Reports = Sequence[TaskReport]
Point = scores.Point


@dataclasses.dataclass(frozen=True)
class Section:
  """One part of the page."""

  name: str  # anchor
  title: str  # heading
  text: str = ""  # one paragraph, or none
  figures: tuple[Figure, ...] = ()  # side by side where there is room
  tables: tuple[Table, ...] = ()  # below the figures
  panels: tuple[TaskReport, ...] = ()  # tasks whose coloured outputs are shown


def sections(reports: Reports) -> tuple[Section, ...]:
  """All sections that have something to show."""
  every = (section(name, reports) for name in SECTIONS)
  return tuple(each for each in every if each.figures or each.tables or each.panels)


def section(name: str, reports: Reports) -> Section:
  """The section of a name in `SECTIONS`."""
  title, text, parts = SECTIONS[name]
  drawn = list(parts(reports))
  return Section(
    name,
    title,
    text,
    tuple(part for part in drawn if isinstance(part, Figure)),
    tuple(part for part in drawn if isinstance(part, Table)),
    tuple(part for part in drawn if isinstance(part, TaskReport)),
  )


# Cells and axes that several tables and figures share.

_SIMILAR: Sequence[Column] = (
  ("like the full model", lambda s: percent(s.similarity)),
  ("± s.e.", lambda s: percent(s.similarity_error)),
)
_QUALITY: Sequence[Column] = (
  ("quality", lambda s: percent(s.quality)),
  ("± s.e.", lambda s: percent(s.quality_error)),
)


def _of(columns: Sequence[Column], get: Callable) -> tuple[Column, ...]:
  """Columns of a part of each entry."""
  return tuple((head, lambda entry, cell=cell: cell(get(entry))) for head, cell in columns)


def _layers(point: Point) -> float:
  return point.scores.layers


def _quality(point: Point) -> float:
  return 100 * point.scores.quality


def _points(found: experiments.Curves) -> list[tuple[str, Point]]:
  """(curve, point) of all curves but the full model's own point."""
  return [(c.name, point) for c in found.curves if c.name != FULL for point in c.points]


# At a glance


def _summary(reports: Reports) -> Iterator[Table]:
  full = lambda report: report.tradeoff.first(FULL).scores

  def best(cell: Callable[..., str], missing: str = "–") -> Callable[[TaskReport], str]:
    def best_cell(report: TaskReport) -> str:
      found = findings.best_gain(report.gains, "textual")
      return cell(*found) if found else missing

    return best_cell

  columns: list[Column] = [
    ("task", lambda r: r.settings.title),
    ("metric", lambda r: r.settings.metric_title),
    ("full model", lambda r: percent(full(r).quality)),
    ("± s.e.", lambda r: percent(full(r).quality_error)),
    ("BLEU", lambda r: number(full(r).bleu, 1)),
    ("oracle layers", lambda r: number(r.tradeoff.first(ORACLE).scores.layers)),
    ("measure", best(lambda row, gain: row.measure, "none certified")),
    ("δ", best(lambda row, gain: f"{row.target.tolerance:g}")),
    ("risk", best(lambda row, gain: number(gain.risk, 3) + mark(row, gain))),
    ("95 %", best(lambda row, gain: interval(gain.risk_interval, 3))),
    ("layers", best(lambda row, gain: number(gain.layers))),
    ("speed-up", best(lambda row, gain: times(gain.speedup))),
    ("95 %", best(lambda row, gain: interval(gain.speedup_interval))),
  ]
  yield tabulate(
    "summary",
    "Tasks",
    columns,
    reports,
    groups=(("", 6), ("certified, textual", 7)),
    note=(
      "Quality of the full model against references (0 to 100). Certified: at the smallest δ"
      " of Table 2 at which anything faster than full depth is certified, the measure that"
      " decodes fastest, against the static full-depth program of the same engine. Being the"
      " fastest of several flatters it a little."
    ),
    text_columns=2,
  )


# Fig. 3

_MEAN_LAYERS = "mean decoder layers a token"
_BAND = (
  "Dotted: the full model, with its 95 % interval as a band; other points are of the same"
  " prompts, so that they rise and fall with it."
)


def _tradeoff(reports: Reports) -> Iterator[Figure | Table]:
  for report in reports:
    yield against_layers(report)
    if report.tradeoff.num_timed:
      yield against_seconds(report)
  for report in reports:
    measured = lambda e, names=report.measures: e[0] in names
    columns: list[Column] = [
      ("curve", lambda e: figures.series_title(e[0])),
      ("threshold", lambda e, m=measured: threshold(e[1].threshold) if m(e) else "–"),
      ("layers", lambda e: number(e[1].scores.layers)),
      (report.settings.metric_title, lambda e: percent(e[1].scores.quality)),
      ("± s.e.", lambda e: percent(e[1].scores.quality_error)),
      ("like the full model", lambda e: percent(e[1].scores.similarity)),
      ("BLEU", lambda e: number(e[1].scores.bleu, 1)),
      ("ms a prompt", lambda e: number(1e3 * e[1].seconds, 2)),
      ("speed-up", lambda e: times(e[1].speedup)),
      ("95 %", lambda e: interval(e[1].speedup_interval)),
    ]
    yield _numbers(report, "fig3", "the numbers of Fig. 3", columns, _points(report.tradeoff))


def _numbers(report: TaskReport, name: str, title: str, columns, entries, **options) -> Table:
  """The numbers of a task's figure."""
  settings = report.settings
  full_title = f"{settings.title}: {title}"
  return tabulate(f"{name}_{settings.name}", full_title, columns, entries, **options)


def against_layers(report: TaskReport) -> Figure:
  """Fig. 3: one point a threshold."""
  found, settings = report.tradeoff, report.settings
  curves = [curve for curve in found.curves if curve.name != FULL]
  styles = figures.styles_of([curve.name for curve in curves])

  def adjust(axes) -> None:
    figures.full_depth(axes, found.first(FULL).scores)
    axes.set_xlim(0.8, report.num_layers + 0.2)

  return figures.draw(
    f"fig3_layers_{settings.name}",
    findings.quality_and_layers(
      found, settings.title, settings.metric_title, report.num_layers
    ),
    f"{found.num_prompts} validation prompts. One point a threshold; up and left is better."
    f" {_BAND}",
    (_MEAN_LAYERS, f"{settings.metric_title} against references"),
    figures.curve_series(curves, styles, _layers, _quality),
    adjust,
  )


def against_seconds(report: TaskReport) -> Figure:
  """Fig. 3 against measured time, where it was measured."""
  found, settings = report.tradeoff, report.settings
  full, oracle = found.first(FULL), found.first(ORACLE).seconds
  curves = [
    scores.Curve(curve.name, tuple(p for p in curve.points if not math.isnan(p.seconds)))
    for curve in found.curves
    if curve.name != FULL
  ]
  styles = figures.styles_of([curve.name for curve in curves])
  beyond = oracle > 1.1 * max(p.seconds for c in curves if c.name != ORACLE for p in c.points)

  def adjust(axes) -> None:
    figures.full_depth(axes, full.scores)
    axes.axvline(1e3 * full.seconds, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)

  caption = (
    f"The same points against time: {found.num_timed} of the prompts, each decoded alone, all"
    f" settings in turn; median of the rounds. Left of the upright line is faster than the full"
    f" model (static, no confidence). {_BAND}"
  )
  if beyond:
    curves = [curve for curve in curves if curve.name != ORACLE]
    caption += (
      f" The oracle ({1e3 * oracle:.0f} ms) is out of the picture: it runs every layer to know"
      " where it may leave."
    )
  return figures.draw(
    f"fig3_seconds_{settings.name}",
    findings.quality_and_seconds(found, settings.title, settings.metric_title),
    caption,
    ("measured decode time a prompt, ms", f"{settings.metric_title} against references"),
    figures.curve_series(curves, styles, lambda point: 1e3 * point.seconds, _quality),
    adjust,
  )


# Table 2

# Of the columns `95 %`, which a terminal has no room for.
INTERVALS = (
  " 95 %: intervals from these prompts alone (risk: a betting test on both sides; decode:"
  " prompts drawn with replacement)."
)


def mark(row: experiments.Row, gain: experiments.Gain) -> str:
  """The mark of a measured risk above the tolerance."""
  return " ▲" if findings.above(row, gain) else ""


def _gains(reports: Reports) -> Iterator[Table]:
  for report in reports:
    for turn in reversed(range(len(experiments.METHODS))):
      yield gains_table(report, turn)


def gains_table(report: TaskReport, turn: int = -1) -> Table:
  """Table 2 for one task and the method at a position of `experiments.METHODS`."""
  found, method = report.gains, experiments.METHODS[turn].name
  cells = [(row, row.gains[turn]) for row in found.rows]
  served = lambda gain: gain.threshold != schedules.NEVER_EXIT
  columns: list[Column] = [
    ("consistency", lambda c: c[0].target.consistency),
    ("δ", lambda c: f"{c[0].target.tolerance:g}"),
    ("measure", lambda c: c[0].measure),
    ("λ", lambda c: threshold(c[1].threshold)),
    ("risk", lambda c: number(c[1].risk, 3) + mark(*c)),
    ("95 %", lambda c: interval(c[1].risk_interval, 3) if served(c[1]) else "–"),
    ("layers", lambda c: number(c[1].layers)),
    ("FLOPs", lambda c: times(c[1].flops_reduction)),
    ("decode", lambda c: times(c[1].speedup)),
    ("95 %", lambda c: interval(c[1].speedup_interval) if served(c[1]) else "–"),
    ("total", lambda c: times(c[1].end_to_end)),
  ]
  return _numbers(
    report,
    "table2" if method == experiments.METHODS[-1].name else f"table2_{method}",
    f"Table 2, method {method}",
    columns,
    cells,
    note=(
      f"{found.num_calibration} calibration prompts, {found.num_unseen} unseen ones; ε ="
      f" {found.error_rate:g} in every cell by itself; losses from"
      f" {report.settings.metric_title}."
      " λ: the calibrated threshold; “never”: nothing was certified, so the full model serves."
      " FLOPs: of the full model over these, decoder only (calm.t5.costs). Decode, total: the"
      " full model's seconds over these, without and with the encoder, measured on"
      f" {found.num_timed} unseen prompts, each decoded alone.{INTERVALS}"
      f"{_above_note(cells, found.num_unseen)}"
    ),
    text_columns=3,
  )


def _above_note(cells: Sequence[findings.Cell], num_unseen: int) -> str:
  """How many measured risks are above what was promised, and what that means."""
  over = [cell for cell in cells if findings.above(*cell)]
  if not over:
    return " No measured risk is above its δ."
  clear = sum(gain.risk_interval[0] > row.target.tolerance for row, gain in over)
  where = (
    f"in {clear} of them the whole interval is"
    if clear
    else "the intervals of all of them reach below it"
  )
  return (
    f" ▲: {len(over)} of {len(cells)} measured risks are above their δ; {where}. The promise is"
    f" of the expected loss, and a mean over {num_unseen} prompts may lie above it."
  )


# App. B


def _validity(reports: Reports) -> Iterator[Figure | Table]:
  for report in reports:
    yield risk_figure(report)
    yield violations_figure(report)
  columns: list[Column] = [
    ("measure", lambda e: e[0].measure),
    ("method", lambda e: e[0].method),
    ("δ", lambda e: f"{e[1].tolerance:g}"),
    ("risk", lambda e: number(e[1].risk_mean, 3)),
    ("± s.d.", lambda e: number(e[1].risk_spread, 3)),
    ("layers", lambda e: number(e[1].layers_mean)),
    ("± s.d.", lambda e: number(e[1].layers_spread)),
    ("certified, %", lambda e: percent(e[1].certified_share, 0)),
    ("violations, %", lambda e: percent(e[2].share)),
    ("95 % interval", lambda e: " - ".join(map(percent, e[2].interval))),
  ]
  groups = (("", 3), ("50 splits, 80 / 20", 5), ("draws from a known pool", 2))
  for report in reports:
    entries = [
      (entry, split, trial)
      for entry in report.validity.trials
      for split, trial in zip(entry.splits, entry.validity, strict=True)
    ]
    title = "risk, layers and violations per δ"
    options = {"groups": groups, "text_columns": 2}
    yield _numbers(report, "validity", title, columns, entries, **options)


def _auto(report: TaskReport) -> list[experiments.MethodTrials]:
  return [entry for entry in report.validity.trials if entry.method == "auto"]


def risk_figure(report: TaskReport) -> Figure:
  """Figure (a), method 'auto': mean and spread of the risk on the test part."""
  entries, styles = _auto(report), figures.styles_of(report.measures)
  series = [
    Series(
      styles[entry.measure],
      [split.tolerance for split in entry.splits],
      [split.risk_mean for split in entry.splits],
      [(s.risk_mean - s.risk_spread, s.risk_mean + s.risk_spread) for s in entry.splits],
    )
    for entry in entries
  ]
  ends = [0, max(max(each.x) for each in series)]
  return figures.draw(
    f"validity_risk_{report.settings.name}",
    findings.risks(entries, report.settings.title),
    f"{report.validity.num_prompts} prompts, textual consistency, method auto. Bars: standard"
    " deviation over 50 splits, which is partly the test part's own noise.",
    ("tolerance δ", "risk on the test part"),
    series,
    lambda axes: axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":"),
  )


def violations_figure(report: TaskReport) -> Figure:
  """Figure (b), method 'auto': share of violations with its interval."""
  found, entries = report.validity, _auto(report)
  styles, series = figures.styles_of(report.measures), []
  for turn, entry in enumerate(entries):
    shift = 0.004 * (turn - (len(entries) - 1) / 2)  # or the bars would cover each other
    series.append(
      Series(
        dataclasses.replace(styles[entry.measure], line="none"),
        [trial.tolerance + shift for trial in entry.validity],
        [100 * trial.share for trial in entry.validity],
        [(100 * trial.interval[0], 100 * trial.interval[1]) for trial in entry.validity],
      )
    )

  def adjust(axes) -> None:
    axes.axhline(100 * found.error_rate, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)

  draws = found.trials[0].validity[0].trials
  return figures.draw(
    f"validity_share_{report.settings.name}",
    findings.violations(entries, report.settings.title, found.error_rate),
    f"{draws} calibration sets of {found.calibration_size} prompts, method auto. Dotted: ε."
    " The promise fails by chance in at most that share.",
    ("tolerance δ", "violations, % of the draws"),
    series,
    adjust,
  )


# Section 3.3.1

# Curve -> (title, the paper's ROUGE-L on CNN/DM).
_PROPAGATIONS = {
  FULL: (FULL, "38.32"),
  "exit_state": ("oracle, dʲ to the skipped layers", "38.24"),
  "first_state": ("oracle, d¹ always", "38.31"),
  "copy_projections": ("oracle, Kʲ and Vʲ copied", "23.02"),
}


def _oracles(reports: Reports) -> Iterator[Table]:
  entries = [
    (report.settings.title, curve.name, curve.points[0].scores)
    for report in reports
    for curve in report.propagations.curves
  ]
  columns: list[Column] = [
    ("task", lambda e: e[0]),
    ("exits", lambda e: _PROPAGATIONS[e[1]][0]),
    ("layers", lambda e: number(e[2].layers)),
    *_of((*_QUALITY, _SIMILAR[0]), lambda e: e[2]),
    ("same text, %", lambda e: percent(e[2].identical)),
    ("paper", lambda e: _PROPAGATIONS[e[1]][1]),
  ]
  yield tabulate(
    "propagation",
    "What skipped layers store",
    columns,
    entries,
    note=(
      "The oracle leaves at the first layer whose first choice is the last layer's, so that"
      " only what the skipped layers store can change the text. Paper: ROUGE-L on CNN/DM, at"
      " 1.53 of 8 layers."
    ),
    text_columns=2,
  )


# Fig. 2a


def _perturbations(reports: Reports) -> Iterator[Figure | Table]:
  yield from map(perturbation_figure, reports)
  columns: list[Column] = [
    ("replaced by", lambda e: e[0]),
    ("position", lambda e: str(e[1].position + 1)),
    ("prompts", lambda e: str(e[1].prompts)),
    ("texts changed, %", lambda e: percent(e[1].changed)),
    ("like unperturbed", lambda e: percent(e[1].similarity)),
    ("± s.e.", lambda e: percent(e[1].similarity_error)),
    ("quality", lambda e: percent(e[1].quality)),
    ("quality before", lambda e: percent(e[1].full_quality)),
  ]
  for report in reports:
    found = report.perturbations
    entries = [("layer-based", point) for point in found.layer]
    entries += [("sampling-based", point) for point in found.sampling]
    yield _numbers(report, "fig2a", "the numbers of Fig. 2a", columns, entries)


def perturbation_figure(report: TaskReport) -> Figure:
  """Fig. 2a: likeness to the unperturbed text by position."""
  found, series = report.perturbations, []
  kinds = {"layer-based": found.layer, "sampling-based": found.sampling}
  for turn, (name, style) in enumerate(figures.line_styles(list(kinds)).items()):
    values = [100 * point.similarity for point in kinds[name]]
    errors = [100 * point.similarity_error for point in kinds[name]]
    # Shifted, or bars would hide bars.
    positions = [point.position + 1 + 0.08 * turn for point in kinds[name]]
    ends = list(map(scores.normal_interval, values, errors))
    series.append(Series(style, positions, values, ends))
  return figures.draw(
    f"fig2a_{report.settings.name}",
    findings.perturbed(found, report.settings.title),
    f"{found.num_prompts} validation prompts; fewer at later positions (see the table). Bars"
    " are 95 % intervals.",
    (
      "position of the replaced token",
      f"{report.settings.metric_title}, to the unperturbed text",
    ),
    series,
    lambda axes: axes.set_ylim(top=101),
  )


# Fig. 2b and 2c


def _schedules(reports: Reports) -> Iterator[Figure | Table]:
  if reports:
    yield values_figure(reports[0].settings.max_decode_length)
  yield from map(decay_figure, reports)
  columns: list[Column] = [
    ("schedule", lambda e: e[0]),
    ("λ", lambda e: threshold(e[1].threshold)),
    ("layers", lambda e: number(e[1].scores.layers)),
    *_of((*_SIMILAR, *_QUALITY), lambda e: e[1].scores),
  ]
  for report in reports:
    entries = _points(report.decay)
    yield _numbers(report, "fig2c", "the numbers of Fig. 2c", columns, entries)


def values_figure(max_length: int) -> Figure:
  """Fig. 2b: the threshold of every token under every schedule."""
  values, every = experiments.schedule_values(max_length), max(1, max_length // 8)
  last = list(values)[-1]
  return figures.draw(
    "fig2b",
    findings.thresholds_shown(last, values[last].tolist()),
    f"Eq. 5 over N = {max_length} tokens.",
    ("token", "its threshold"),
    [
      Series(style, range(max_length), values[name].tolist(), options={"markevery": every})
      for name, style in figures.line_styles(list(values)).items()
    ],
    lambda axes: axes.set_ylim(0.6, 1.0),
  )


def decay_figure(report: TaskReport) -> Figure:
  """Fig. 2c: similarity against layers under every schedule."""
  curves, similarity = report.decay.curves, lambda point: 100 * point.scores.similarity
  styles = figures.line_styles([curve.name for curve in curves])
  return figures.draw(
    f"fig2c_{report.settings.name}",
    findings.schedules_compared(report.decay, report.settings.title),
    f"{report.decay.num_prompts} validation prompts, measure {report.measures[0]}, λ in steps"
    f" of {report.step:g}.",
    (_MEAN_LAYERS, f"{report.settings.metric_title}, to the full model's text"),
    figures.curve_series(curves, styles, _layers, similarity, markersize=3),
  )


# App. D and Eq. 6


def _trainings(reports: Reports) -> Iterator[Figure]:
  for report in reports:
    for kind, title in (
      ("classifiers", findings.classifiers),
      ("objectives", findings.objectives),
    ):
      found: experiments.Curves | None = getattr(report, kind)
      if found is not None:
        yield comparison_figure(report, kind, found, title(found, report.settings.title))


def comparison_figure(
  report: TaskReport, kind: str, found: experiments.Curves, title: str
) -> Figure:
  """Quality against layers of two trainings."""
  styles = figures.line_styles([curve.name for curve in found.curves])
  error = max(point.scores.quality_error for _, point in _points(found))
  caption = (
    f"{found.num_prompts} validation prompts, the same for both; a point's standard error is at"
    f" most {100 * error:.1f}."
  )
  return figures.draw(
    f"{kind}_{report.settings.name}",
    title,
    caption,
    (_MEAN_LAYERS, f"{report.settings.metric_title} against references"),
    figures.curve_series(found.curves, styles, _layers, _quality),
  )


# Table 1


def _lengths(reports: Reports) -> Iterator[Table]:
  columns: list[Column] = [
    ("task", lambda r: r.settings.title),
    ("prompts", lambda r: str(r.lengths.references.count)),
    ("references", lambda r: str(r.lengths.references)),
    ("full model's outputs", lambda r: str(r.lengths.outputs)),
    ("inputs", lambda r: str(r.lengths.inputs)),
    ("inputs cut, %", lambda r: percent(r.lengths.cut_inputs)),
    ("paper's task", lambda r: r.settings.stands_for or "–"),
    ("paper", lambda r: r.settings.paper_length or "–"),
  ]
  note = "Tokens of the model's own vocabulary: mean (5th - 95th percentile)."
  yield tabulate("table1", "Table 1", columns, reports, note=note)


# Name -> (title, text, reports -> figures, tables and panels), in the order of reading.
SECTIONS: dict[str, tuple[str, str, Callable[[Reports], Iterator]]] = {
  "summary": ("At a glance", "", _summary),
  "tradeoff": (
    "Quality against cost (Fig. 3)",
    "Every confidence measure over its grid of thresholds, beside models that always run the"
    " same number of layers (static) and the oracle, which leaves at the first layer that"
    " already says what the last one will. Layers are the paper's axis; seconds are what a"
    " user pays.",
    _tradeoff,
  ),
  "gains": (
    "Calibrated gains (Table 2)",
    "The threshold is calibrated on one part of the test split and everything else is"
    " measured on the other, which no choice has seen. Textual: the loss is the distance to"
    " the full model's text. Risk: the increase of the loss against references. Method"
    " “paper” tests with Hoeffding-Bentkus, for risk on losses clipped at 0 (Eq. 11);"
    " “auto” tests by betting, for risk on the signed losses of Eq. 2.",
    _gains,
  ),
  "outputs": (
    "Outputs, token by token (Fig. 4)",
    "Every token on the colour of the decoder layers that it took. Drag the tolerance: more of"
    " it lets tokens leave earlier, until the text changes. Each tolerance is a promise by"
    " itself, kept where it was chosen before looking. D is the distance to the full model's"
    " text, R the change of the loss against the reference (negative: better than the full"
    " model).",
    iter,
  ),
  "validity": (
    "Does the promise hold? (App. B)",
    "Risk: 50 random splits of the test prompts, 80 % to calibrate on and 20 % to look at."
    " What is found stays below the tolerance, the dotted line, by as much as the test of the"
    " threshold is cautious. Failures: calibration sets drawn with replacement, so that the"
    " true risk is known. The share of sets whose threshold breaks the tolerance must not"
    " exceed ε; bars are 95 % intervals.",
    _validity,
  ),
  "oracles": ("State propagation (section 3.3.1)", "", _oracles),
  "perturbations": (
    "One wrong token (Fig. 2a)",
    "One token of an output is replaced, by the last layer's 10th choice (sampling-based) or"
    " by the first layer's own choice (layer-based), and decoding goes on at full depth. Only"
    " outputs that have a token at that position count.",
    _perturbations,
  ),
  "schedules": (
    "Decaying thresholds (Fig. 2b, 2c)",
    "The threshold that each token has to clear, and what it buys. Eq. 5 with τ = 0 is 0.9 λ"
    " + 0.1 for every token, which is another thing than the constant λ: the same trade-off"
    " at other values of λ.",
    _schedules,
  ),
  "trainings": (
    "Trainings side by side (App. D, Eq. 6)",
    "The exit classifier trained per layer or in Elbayad's geometric-like way, over its grid;"
    " and a model trained on every layer (Eq. 6) or on the last one only, cut at each depth.",
    _trainings,
  ),
  "lengths": ("Lengths (Table 1)", "", _lengths),
}
