"""Sections beyond the main results: promises, oracles, wrong tokens, schedules, trainings."""

from collections.abc import Iterator, Sequence

from matplotlib import axes as mpl_axes

from calm.paper.bench import intervals
from calm.paper.experiments import claims, propagations, suite, trainings
from calm.paper.report import figures, findings
from calm.paper.report.figures import Figure
from calm.paper.report.section import Section
from calm.paper.report.tables import Table, number, percent, threshold

Reports = Sequence[suite.TaskReport]


def oracles(reports: Reports) -> Section:
  """Section 3.3.1."""
  columns = (
    "task",
    "exits",
    "layers",
    "quality",
    "± s.e.",
    "like the full model",
    "same text, %",
    "paper",
  )
  table = Table(
    name="propagation",
    title="What skipped layers store",
    columns=columns,
    rows=tuple(row for report in reports for row in _propagation_rows(report)),
    note=(
      "The oracle leaves at the first layer whose first choice is the last layer's, so that"
      " only what the skipped layers store can change the text. Paper: ROUGE-L on CNN/DM, at"
      " 1.53 of 8 layers."
    ),
    text_columns=2,
  )
  return Section("oracles", "State propagation (section 3.3.1)", tables=(table,))


def _propagation_rows(report: suite.TaskReport) -> Iterator[tuple[str, ...]]:
  task, found = report.settings.title, report.propagations
  yield task, "full model", *_score_cells(found.full), "100.0", propagations.PAPER_FULL
  for variant in found.variants:
    title, paper = propagations.TITLES[variant.name]
    yield task, title, *_score_cells(variant.scores), percent(variant.identical), paper


def _score_cells(scored) -> tuple[str, ...]:
  return (
    number(scored.layers),
    percent(scored.quality),
    percent(scored.quality_error),
    percent(scored.similarity),
  )


def perturbed_tokens(reports: Reports) -> Section:
  """Fig. 2a."""
  return Section(
    "perturbations",
    "One wrong token (Fig. 2a)",
    text=(
      "One token of an output is replaced, by the last layer's 10th choice (sampling-based) or"
      " by the first layer's own choice (layer-based), and decoding goes on at full depth. Only"
      " outputs that have a token at that position count.",
    ),
    figures=tuple(_perturbation_figure(report) for report in reports),
    tables=tuple(_perturbation_table(report) for report in reports),
  )


def _perturbation_figure(report: suite.TaskReport) -> Figure:
  found = report.perturbations

  def paint(axes: mpl_axes.Axes) -> None:
    for turn, (label, points) in enumerate(
      (("layer-based", found.layer), ("sampling-based", found.sampling))
    ):
      errors = [
        intervals.of_error(100 * point.similarity, 100 * point.similarity_error)
        for point in points
      ]
      figures.bars(
        axes,
        figures.line_style(turn, label),
        [point.position + 1 + 0.08 * turn for point in points],  # or bars would hide bars
        [100 * point.similarity for point in points],
        errors,
      )
    axes.set_xlabel("position of the replaced token")
    axes.set_ylabel(f"{report.settings.metric_title}, to the unperturbed text")
    axes.set_ylim(top=101)

  return figures.draw(
    f"fig2a_{report.settings.name}",
    findings.perturbed(found, report.settings.title),
    f"{found.num_prompts} validation prompts; fewer at later positions (see the table). Bars"
    " are 95 % intervals.",
    paint,
  )


def _perturbation_table(report: suite.TaskReport) -> Table:
  found = report.perturbations
  rows = tuple(
    (
      kind,
      str(point.position + 1),
      str(point.prompts),
      percent(point.changed),
      percent(point.similarity),
      percent(point.similarity_error),
      percent(point.quality),
      percent(point.full_quality),
    )
    for kind, points in (("layer-based", found.layer), ("sampling-based", found.sampling))
    for point in points
  )
  return Table(
    name=f"fig2a_{report.settings.name}",
    title=f"{report.settings.title}: the numbers of Fig. 2a",
    columns=(
      *("replaced by", "position", "prompts", "texts changed, %", "like unperturbed", "± s.e."),
      *("quality", "quality before"),
    ),
    rows=rows,
  )


def schedules_compared(reports: Reports) -> Section:
  """Fig. 2b and 2c."""
  drawn = [_values_figure(reports[0])] if reports else []
  drawn += [_decay_figure(report) for report in reports]
  return Section(
    "schedules",
    "Decaying thresholds (Fig. 2b, 2c)",
    text=(
      "The threshold that each token has to clear, and what it buys. Eq. 5 with τ = 0 is 0.9 λ"
      " + 0.1 for every token, which is another thing than the constant λ: the same trade-off"
      " at other values of λ.",
    ),
    figures=tuple(drawn),
    tables=tuple(_decay_table(report) for report in reports),
  )


def _values_figure(report: suite.TaskReport) -> Figure:
  found = report.decay

  def paint(axes: mpl_axes.Axes) -> None:
    for turn, values in enumerate(found.values):
      x = list(range(len(values.values)))
      style = figures.line_style(turn, values.name)
      figures.plot(axes, style, x, values.values, markevery=max(1, len(x) // 8))
    axes.set_xlabel("token")
    axes.set_ylabel("its threshold")
    axes.set_ylim(0.6, 1.0)

  return figures.draw(
    "fig2b",
    findings.thresholds_shown(found),
    f"Eq. 5 over N = {found.max_length} tokens.",
    paint,
  )


def _decay_figure(report: suite.TaskReport) -> Figure:
  found = report.decay

  def paint(axes: mpl_axes.Axes) -> None:
    for turn, curve in enumerate(found.curves):
      scored = [point.scores for point in curve.points]
      style = figures.line_style(turn, curve.name)
      x, y = [s.layers for s in scored], [100 * s.similarity for s in scored]
      figures.plot(axes, style, x, y, markersize=3)
    axes.set_xlabel("mean decoder layers a token")
    axes.set_ylabel(f"{report.settings.metric_title}, to the full model's text")

  return figures.draw(
    f"fig2c_{report.settings.name}",
    findings.schedules_compared(found, report.settings.title),
    f"{found.num_prompts} validation prompts, measure {found.measure}, λ in steps of"
    f" {found.step:g}.",
    paint,
  )


def _decay_table(report: suite.TaskReport) -> Table:
  rows = tuple(
    (
      curve.name,
      threshold(point.threshold),
      number(point.scores.layers),
      percent(point.scores.similarity),
      percent(point.scores.similarity_error),
      percent(point.scores.quality),
      percent(point.scores.quality_error),
    )
    for curve in report.decay.curves
    for point in curve.points
  )
  return Table(
    name=f"fig2c_{report.settings.name}",
    title=f"{report.settings.title}: the numbers of Fig. 2c",
    columns=("schedule", "λ", "layers", "like the full model", "± s.e.", "quality", "± s.e."),
    rows=rows,
  )


def trainings_compared(reports: Reports) -> Section:
  """App. D and the cost of Eq. 6, where the models are given."""
  drawn = []
  for report in reports:
    name, title = report.settings.name, report.settings.title
    if report.classifiers is not None:
      drawn.append(
        _comparison_figure(
          report.classifiers,
          f"classifiers_{name}",
          findings.classifiers(report.classifiers, title),
          report.settings.metric_title,
        )
      )
    if report.objectives is not None:
      drawn.append(
        _comparison_figure(
          report.objectives,
          f"objectives_{name}",
          findings.objectives(report.objectives, title),
          report.settings.metric_title,
        )
      )
  return Section(
    "trainings",
    "Trainings side by side (App. D, Eq. 6)",
    text=(
      "The exit classifier trained per layer or in Elbayad's geometric-like way, over its grid;"
      " and a model trained on every layer (Eq. 6) or on the last one only, cut at each depth.",
    ),
    figures=tuple(drawn),
  )


def _comparison_figure(
  found: trainings.Comparison, name: str, title: str, metric: str
) -> Figure:
  def paint(axes: mpl_axes.Axes) -> None:
    for turn, curve in enumerate(found.curves):
      scored = [point.scores for point in curve.points]
      x, y = [s.layers for s in scored], [100 * s.quality for s in scored]
      figures.plot(axes, figures.line_style(turn, curve.name), x, y)
    axes.set_xlabel("mean decoder layers a token")
    axes.set_ylabel(f"{metric} against references")

  error = max(p.scores.quality_error for curve in found.curves for p in curve.points)
  caption = (
    f"{found.num_prompts} validation prompts, the same for both; a point's standard error is at"
    f" most {100 * error:.1f}."
  )
  return figures.draw(name, title, caption, paint)


_MARKS = {True: "agrees", False: "differs", None: "cannot tell"}


def claims_checked(reports: Reports) -> Section:
  """The paper's sentences beside our numbers."""
  rows = []
  for claim in claims.CLAIMS:
    for report in reports:
      finding = claim.check(report)
      rows.append(
        (
          claim.text,
          claim.paper,
          report.settings.title,
          _MARKS[finding.agrees],
          finding.found,
        )
      )
  table = Table(
    name="claims",
    title="What the paper says, and what was found",
    columns=("the paper", "its numbers", "task", "here", "numbers here"),
    rows=tuple(rows),
    note=(
      "Decided by fixed rules on the numbers of this page (calm/paper/experiments/claims.py),"
      " not by hand. Models, tasks and machine are other than the paper's: a small T5 on short"
      " Debian texts, seconds on this machine instead of estimates for TPU v3."
    ),
    text_columns=5,
    wrap=True,
  )
  return Section("claims", "Where this agrees with the paper", tables=(table,))
