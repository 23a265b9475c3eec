"""The page as data: one table of sections, each with its words, figures and tables."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from calm.inference.panel import number, threshold
from calm.paper import experiments, figures, findings, scores
from calm.paper.experiments import FULL, ORACLE, TaskReport
from calm.paper.figures import INK, Figure, Series
from calm.paper.tables import Column, Table, interval, percent, tabulate, times

Reports = Sequence[TaskReport]


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


_MEAN_LAYERS = "mean decoder layers a token"
_QUALITY: Sequence[Column] = (
  ("quality", lambda point: percent(point.quality)),
  ("± s.e.", lambda point: percent(point.quality_error)),
)


def _table(report: TaskReport, name: str, title: str, columns, entries, **options) -> Table:
  """A table of one task."""
  settings = report.settings
  full_title = f"{settings.title}: {title}"
  return tabulate(f"{name}_{settings.name}", full_title, columns, entries, **options)


def _without_full(found: experiments.Curves) -> dict[str, list[scores.Point]]:
  """All curves but the full model's own point."""
  return {name: points for name, points in found.curves.items() if name != FULL}


# At a glance


def _summary(reports: Reports) -> Iterator[Table]:
  full = lambda report: report.tradeoff.first(FULL)

  def best(cell: Callable[[experiments.Gain], str], missing: str = "–"):
    def best_cell(report: TaskReport) -> str:
      found = findings.best_gain(report.gains)
      return cell(found) if found else missing

    return best_cell

  columns: list[Column] = [
    ("task", lambda r: r.settings.title),
    ("metric", lambda r: r.settings.metric_title),
    ("full model", lambda r: percent(full(r).quality)),
    ("± s.e.", lambda r: percent(full(r).quality_error)),
    ("BLEU", lambda r: number(full(r).bleu, 1)),
    ("oracle layers", lambda r: number(r.tradeoff.first(ORACLE).layers)),
    ("measure", best(lambda gain: gain.measure, "none certified")),
    ("δ", best(lambda gain: f"{gain.tolerance:g}")),
    ("risk", best(risk)),
    ("95 %", best(lambda gain: interval(gain.risk_interval, 3))),
    ("layers", best(lambda gain: number(gain.layers))),
    ("speed-up", best(lambda gain: times(gain.speedup))),
    ("95 %", best(lambda gain: interval(gain.speedup_interval))),
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

_BAND = (
  "Dotted: the full model, with its 95 % interval as a band; other points are of the same"
  " prompts, so that they rise and fall with it."
)


def _tradeoff(reports: Reports) -> Iterator[Figure | Table]:
  for report in reports:
    yield _against_layers(report)
    if report.tradeoff.num_timed:
      yield _against_seconds(report)
  for report in reports:
    measured = lambda p, names=report.measures: p.name in names
    columns: list[Column] = [
      ("curve", lambda p: figures.series_title(p.name)),
      ("threshold", lambda p, m=measured: threshold(p.threshold) if m(p) else "–"),
      ("layers", lambda p: number(p.layers)),
      (report.settings.metric_title, lambda p: percent(p.quality)),
      ("± s.e.", lambda p: percent(p.quality_error)),
      ("like the full model", lambda p: percent(p.similarity)),
      ("BLEU", lambda p: number(p.bleu, 1)),
      ("ms a prompt", lambda p: number(1e3 * p.seconds, 2)),
      ("speed-up", lambda p: times(p.speedup)),
      ("95 %", lambda p: interval(p.speedup_interval)),
    ]
    points = [point for point in report.tradeoff.points if point.name != FULL]
    yield _table(report, "fig3", "the numbers of Fig. 3", columns, points)


def _against_layers(report: TaskReport) -> Figure:
  """Fig. 3: one point a threshold."""
  found, settings = report.tradeoff, report.settings
  title, metric = settings.title, settings.metric_title
  curves = _without_full(found)

  def adjust(axes) -> None:
    figures.full_depth(axes, found.first(FULL))
    axes.set_xlim(0.8, report.num_layers + 0.2)

  return figures.draw(
    f"fig3_layers_{settings.name}",
    findings.quality_and_layers(found, title, metric, report.num_layers),
    f"{found.num_prompts} validation prompts. One point a threshold; up and left is better."
    f" {_BAND}",
    (_MEAN_LAYERS, f"{metric} against references"),
    figures.curve_series(curves, figures.styles_of([*curves]), "layers", "quality"),
    adjust,
  )


def _against_seconds(report: TaskReport) -> Figure:
  """Fig. 3 against measured time, where it was measured."""
  found, settings = report.tradeoff, report.settings
  full, oracle = found.first(FULL), found.first(ORACLE).seconds
  curves = _without_full(found)
  styles = figures.styles_of([*curves])
  curves = {
    name: [point for point in points if not math.isnan(point.seconds)]
    for name, points in curves.items()
  }

  def adjust(axes) -> None:
    figures.full_depth(axes, full)
    axes.axvline(1e3 * full.seconds, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)

  caption = (
    f"The same points against time: {found.num_timed} of the prompts, each decoded alone, all"
    f" settings in turn; median of the rounds. Left of the upright line is faster than the full"
    f" model (static, no confidence). {_BAND}"
  )
  others = {name: points for name, points in curves.items() if name != ORACLE}
  if oracle > 1.1 * max(point.seconds for points in others.values() for point in points):
    curves = others
    caption += (
      f" The oracle ({1e3 * oracle:.0f} ms) is out of the picture: it runs every layer to know"
      " where it may leave."
    )
  return figures.draw(
    f"fig3_seconds_{settings.name}",
    findings.quality_and_seconds(found, settings.title, settings.metric_title),
    caption,
    ("measured decode time a prompt, ms", f"{settings.metric_title} against references"),
    figures.curve_series(curves, styles, "seconds", "quality"),
    adjust,
  )


# Table 2

# Of the columns `95 %`, which a terminal has no room for.
INTERVALS = (
  " 95 %: intervals from these prompts alone (risk: a betting test on both sides; decode:"
  " prompts drawn with replacement)."
)


def risk(gain: experiments.Gain) -> str:
  """The risk that was measured on unseen prompts, marked where it is above the tolerance."""
  return number(gain.risk, 3) + (" ▲" if gain.above else "")


def _gains(reports: Reports) -> Iterator[Table]:
  for report in reports:
    for method in reversed(experiments.METHODS):
      yield gains_table(report, method)


def gains_table(report: TaskReport, method: str = "auto") -> Table:
  """Table 2 for one task and method of `experiments.METHODS`."""
  found = report.gains
  cells = [gain for gain in found.cells if gain.method == method]
  columns: list[Column] = [
    ("consistency", lambda gain: gain.consistency),
    ("δ", lambda gain: f"{gain.tolerance:g}"),
    ("measure", lambda gain: gain.measure),
    ("λ", lambda gain: threshold(gain.threshold)),
    ("risk", risk),
    ("95 %", lambda gain: interval(gain.risk_interval, 3) if gain.exits else "–"),
    ("layers", lambda gain: number(gain.layers)),
    ("FLOPs", lambda gain: times(gain.flops_reduction)),
    ("decode", lambda gain: times(gain.speedup)),
    ("95 %", lambda gain: interval(gain.speedup_interval) if gain.exits else "–"),
    ("total", lambda gain: times(gain.end_to_end)),
  ]
  return _table(
    report,
    "table2" if method == "auto" else f"table2_{method}",
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


def _above_note(cells: Sequence[experiments.Gain], num_unseen: int) -> str:
  """How many measured risks are above what was promised, and what that means."""
  over = [gain for gain in cells if gain.above]
  if not over:
    return " No measured risk is above its δ."
  clear = sum(gain.risk_interval[0] > gain.tolerance for gain in over)
  where = "the intervals of all of them reach below it"
  if clear:
    where = f"in {clear} of them the whole interval is"
  return (
    f" ▲: {len(over)} of {len(cells)} measured risks are above their δ; {where}. The promise is"
    f" of the expected loss, and a mean over {num_unseen} prompts may lie above it."
  )


# App. B


def _validity(reports: Reports) -> Iterator[Figure | Table]:
  for report in reports:
    shown = [entry for entry in report.validity.trials if entry.method == "auto"]
    yield _risk_figure(report, shown)
    yield _violations_figure(report, shown)
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
    yield _table(report, "validity", title, columns, entries, **options)


def _risk_figure(report: TaskReport, entries: Sequence[experiments.MethodTrials]) -> Figure:
  """Figure (a): mean and spread of the risk on the test part."""
  styles = figures.styles_of(report.measures)
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


def _violations_figure(
  report: TaskReport, entries: Sequence[experiments.MethodTrials]
) -> Figure:
  """Figure (b): share of violations with its interval."""
  found, styles, series = report.validity, figures.styles_of(report.measures), []
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
  columns: list[Column] = [
    ("task", lambda e: e[0]),
    ("exits", lambda e: _PROPAGATIONS[e[1].name][0]),
    ("layers", lambda e: number(e[1].layers)),
    ("quality", lambda e: percent(e[1].quality)),
    ("± s.e.", lambda e: percent(e[1].quality_error)),
    ("like the full model", lambda e: percent(e[1].similarity)),
    ("same text, %", lambda e: percent(e[1].identical)),
    ("paper", lambda e: _PROPAGATIONS[e[1].name][1]),
  ]
  yield tabulate(
    "propagation",
    "What skipped layers store",
    columns,
    [(r.settings.title, point) for r in reports for point in r.propagations.points],
    note=(
      "The oracle leaves at the first layer whose first choice is the last layer's, so that"
      " only what the skipped layers store can change the text. Paper: ROUGE-L on CNN/DM, at"
      " 1.53 of 8 layers."
    ),
    text_columns=2,
  )


# Fig. 2a


def _perturbations(reports: Reports) -> Iterator[Figure | Table]:
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
    found, settings, series = report.perturbations, report.settings, []
    kinds = {"layer-based": found.layer, "sampling-based": found.sampling}
    for turn, (name, style) in enumerate(figures.line_styles([*kinds]).items()):
      values = [100 * point.similarity for point in kinds[name]]
      errors = [100 * point.similarity_error for point in kinds[name]]
      # Shifted, or bars would hide bars.
      positions = [point.position + 1 + 0.08 * turn for point in kinds[name]]
      ends = list(map(scores.normal_interval, values, errors))
      series.append(Series(style, positions, values, ends))
    yield figures.draw(
      f"fig2a_{settings.name}",
      findings.perturbed(found, settings.title),
      f"{found.num_prompts} validation prompts; fewer at later positions (see the table). Bars"
      " are 95 % intervals.",
      ("position of the replaced token", f"{settings.metric_title}, to the unperturbed text"),
      series,
      lambda axes: axes.set_ylim(top=101),
    )
    entries = [(name, point) for name, points in kinds.items() for point in points]
    yield _table(report, "fig2a", "the numbers of Fig. 2a", columns, entries)


# Fig. 2b and 2c


def _schedules(reports: Reports) -> Iterator[Figure | Table]:
  if reports:
    yield _values_figure(reports[0].settings.max_decode_length)
  columns: list[Column] = [
    ("schedule", lambda point: point.name),
    ("λ", lambda point: threshold(point.threshold)),
    ("layers", lambda point: number(point.layers)),
    ("like the full model", lambda point: percent(point.similarity)),
    ("± s.e.", lambda point: percent(point.similarity_error)),
    *_QUALITY,
  ]
  for report in reports:
    found, settings = report.decay, report.settings
    styles = figures.line_styles([*found.curves])
    yield figures.draw(
      f"fig2c_{settings.name}",
      findings.schedules_compared(found, settings.title),
      f"{found.num_prompts} validation prompts, measure {report.measures[0]}, λ in steps of"
      f" {report.step:g}.",
      (_MEAN_LAYERS, f"{settings.metric_title}, to the full model's text"),
      figures.curve_series(found.curves, styles, "layers", "similarity", markersize=3),
    )
    yield _table(report, "fig2c", "the numbers of Fig. 2c", columns, found.points)


def _values_figure(max_length: int) -> Figure:
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


# App. D and Eq. 6


def _trainings(reports: Reports) -> Iterator[Figure]:
  for report in reports:
    pairs = {"classifiers": report.classifiers, "objectives": report.objectives}
    for kind, found in pairs.items():
      if found is None:
        continue
      styles = figures.line_styles([*found.curves])
      error = max(point.quality_error for point in found.points)
      yield figures.draw(
        f"{kind}_{report.settings.name}",
        getattr(findings, kind)(found, report.settings.title),
        f"{found.num_prompts} validation prompts, the same for both; a point's standard error"
        f" is at most {100 * error:.1f}.",
        (_MEAN_LAYERS, f"{report.settings.metric_title} against references"),
        figures.curve_series(found.curves, styles, "layers", "quality"),
      )


# Table 1


def _lengths(reports: Reports) -> Iterator[Table]:
  columns: list[Column] = [
    ("task", lambda r: r.settings.title),
    ("prompts", lambda r: str(r.lengths.num_references)),
    ("references", lambda r: r.lengths.references),
    ("full model's outputs", lambda r: r.lengths.outputs),
    ("inputs", lambda r: r.lengths.inputs),
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
