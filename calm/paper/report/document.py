"""Task reports -> sections: what stands on the page, in which order and with which words."""

from collections.abc import Callable, Sequence

from calm.paper.experiments import gains, suite, tradeoff
from calm.paper.report import ablations, figures, findings, promises, table2
from calm.paper.report.figures import Figure
from calm.paper.report.section import Panel, Section
from calm.paper.report.tables import Table, number, percent, threshold, times

Reports = Sequence[suite.TaskReport]


def sections(reports: Reports) -> tuple[Section, ...]:
  """Everything that was found, as sections."""
  builders: tuple[Callable[[Reports], Section], ...] = (
    summary,
    quality_and_cost,
    table2.calibrated_gains,
    coloured_outputs,
    promises.promises_kept,
    ablations.oracles,
    ablations.perturbed_tokens,
    ablations.schedules_compared,
    ablations.trainings_compared,
    output_lengths,
    ablations.claims_checked,
  )
  made = (build(reports) for build in builders)
  return tuple(
    section for section in made if section.figures or section.tables or section.panels
  )


def summary(reports: Reports) -> Section:
  """The first thing that is read: one row a task."""
  table = Table(
    name="summary",
    title="Tasks",
    columns=(
      "task",
      "metric",
      "full model",
      "± s.e.",
      "BLEU",
      "oracle layers",
      "measure",
      "δ",
      "risk",
      "95 %",
      "layers",
      "speed-up",
      "95 %",
    ),
    groups=(("", 6), ("certified, textual", 7)),
    rows=tuple(map(_summary_row, reports)),
    note=(
      "Quality of the full model against references (0 to 100). Certified: at the smallest δ"
      " of Table 2 at which anything faster than full depth is certified, the measure that"
      " decodes fastest, against the static full-depth program of the same engine. Being the"
      " fastest of several flatters it a little."
    ),
    text_columns=2,
  )
  return Section("summary", "At a glance", tables=(table,))


def _summary_row(report: suite.TaskReport) -> tuple[str, ...]:
  oracle = report.tradeoff.curve(tradeoff.ORACLE)
  return (
    report.settings.title,
    report.settings.metric_title,
    percent(report.full.quality),
    percent(report.full.quality_error),
    number(report.full.bleu, 1),
    f"{oracle.points[0].scores.layers:.2f}" if oracle else "–",
    *_best_cells(findings.best_gain(report.gains, "textual")),
  )


def _best_cells(best: tuple[gains.Row, gains.Gain] | None) -> tuple[str, ...]:
  if best is None:
    return ("none certified", *("–",) * 6)
  row, gain = best
  return (
    row.measure,
    f"{row.target.tolerance:g}",
    number(gain.risk, 3) + table2.mark(row, gain),
    table2.ends(gain.risk_interval, 3),
    number(gain.layers),
    times(gain.speedup),
    table2.ends(gain.speedup_interval),
  )


def quality_and_cost(reports: Reports) -> Section:
  """Fig. 3."""
  drawn: list[Figure | None] = []
  for report in reports:
    settings = report.settings
    drawn.append(
      figures.quality_against_layers(
        report.tradeoff,
        f"fig3_layers_{settings.name}",
        findings.quality_and_layers(report.tradeoff, settings.title, settings.metric_title),
        settings.metric_title,
      )
    )
    drawn.append(
      figures.quality_against_seconds(
        report.tradeoff,
        f"fig3_seconds_{settings.name}",
        findings.quality_and_seconds(report.tradeoff, settings.title, settings.metric_title),
        settings.metric_title,
      )
    )
  return Section(
    "tradeoff",
    "Quality against cost (Fig. 3)",
    text=(
      "Every confidence measure over its grid of thresholds, beside models that always run the"
      " same number of layers (static) and the oracle, which leaves at the first layer that"
      " already says what the last one will. Layers are the paper's axis; seconds are what a"
      " user pays.",
    ),
    figures=tuple(figure for figure in drawn if figure is not None),
    tables=tuple(curve_table(report) for report in reports),
  )


def curve_table(report: suite.TaskReport) -> Table:
  """The numbers behind Fig. 3."""
  rows = tuple(
    (
      figures.series_title(curve.name),
      threshold(point.threshold) if curve.name in report.measures else "–",
      number(point.scores.layers),
      percent(point.scores.quality),
      percent(point.scores.quality_error),
      percent(point.scores.similarity),
      number(point.scores.bleu, 1),
      number(1e3 * point.seconds, 2),
      times(point.speedup),
      table2.ends(point.speedup_interval),
    )
    for curve in report.tradeoff.curves
    for point in curve.points
  )
  metric = report.settings.metric_title
  return Table(
    name=f"fig3_{report.settings.name}",
    title=f"{report.settings.title}: the numbers of Fig. 3",
    columns=(
      "curve",
      "threshold",
      "layers",
      metric,
      "± s.e.",
      "like the full model",
      "BLEU",
      "ms a prompt",
      "speed-up",
      "95 %",
    ),
    rows=rows,
  )


def coloured_outputs(reports: Reports) -> Section:
  """Fig. 4."""
  return Section(
    "outputs",
    "Outputs, token by token (Fig. 4)",
    text=(
      "Every token on the colour of the decoder layers that it took. Move the slider: a lower"
      " threshold lets tokens leave earlier, until the text changes. The certified threshold"
      " comes first, where there is one. D is the distance to the full model's text, R the"
      " change of the loss against the reference (negative: better than the full model).",
    ),
    panels=tuple(
      Panel(
        report.settings.name,
        report.settings.title,
        report.settings.metric_title,
        report.examples,
      )
      for report in reports
    ),
  )


def output_lengths(reports: Reports) -> Section:
  """Table 1."""
  rows = tuple(
    (
      report.settings.title,
      str(report.lengths.references.count),
      str(report.lengths.references),
      str(report.lengths.outputs),
      str(report.lengths.inputs),
      percent(report.lengths.cut_inputs),
      report.settings.stands_for or "–",
      report.settings.paper_length or "–",
    )
    for report in reports
  )
  table = Table(
    name="table1",
    title="Table 1",
    columns=(
      "task",
      "prompts",
      "references",
      "full model's outputs",
      "inputs",
      "inputs cut, %",
      "paper's task",
      "paper",
    ),
    rows=rows,
    note="Tokens of the model's own vocabulary: mean (5th - 95th percentile).",
  )
  return Section("lengths", "Lengths (Table 1)", tables=(table,))
