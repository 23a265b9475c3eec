"""Task reports -> sections: what stands on the page, in which order and with which words."""

from collections.abc import Callable, Sequence

from calm.paper.experiments import gains, suite, tradeoff
from calm.paper.report import ablations, figures, promises
from calm.paper.report.figures import Figure
from calm.paper.report.section import Panel, Section
from calm.paper.report.tables import Table, number, percent, threshold, times

Reports = Sequence[suite.TaskReport]


def sections(reports: Reports) -> tuple[Section, ...]:
  """Everything that was found, as sections."""
  builders: tuple[Callable[[Reports], Section], ...] = (
    summary,
    quality_and_cost,
    calibrated_gains,
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
  rows = []
  for report in reports:
    oracle = report.tradeoff.curve(tradeoff.ORACLE)
    best = best_gain(report.gains, "textual")
    rows.append(
      (
        report.settings.title,
        report.settings.metric_title,
        percent(report.full.quality),
        number(report.full.bleu, 1),
        f"{oracle.points[0].scores.layers:.2f}" if oracle else "–",
        *_best_cells(best),
      )
    )
  table = Table(
    name="summary",
    title="Tasks",
    columns=(
      "task",
      "metric",
      "full model",
      "BLEU",
      "oracle layers",
      "measure",
      "δ",
      "layers",
      "measured speed-up",
    ),
    groups=(("", 5), ("fastest certified, textual", 4)),
    rows=tuple(rows),
    note=(
      "Quality of the full model against references (0 to 100). Fastest certified: the"
      " calibrated threshold with the largest measured decode speed-up of Table 2, over the"
      " static full-depth program of the same engine."
    ),
    text_columns=2,
  )
  return Section("summary", "At a glance", tables=(table,))


def best_gain(found: gains.Gains, consistency: str) -> tuple[gains.Row, gains.Gain] | None:
  """The certified cell with the largest measured speed-up, or None."""
  cells = [
    (row, gain)
    for row in found.rows
    for gain in row.gains
    if row.target.consistency == consistency and gain.threshold <= 1.0
  ]
  return max(cells, key=lambda cell: cell[1].speedup, default=None)


def _best_cells(best: tuple[gains.Row, gains.Gain] | None) -> tuple[str, ...]:
  if best is None:
    return ("none certified", "–", "–", "–")
  row, gain = best
  delta = f"{row.target.tolerance:g}"
  return (row.measure, delta, number(gain.layers), times(gain.speedup))


def quality_and_cost(reports: Reports) -> Section:
  """Fig. 3."""
  drawn: list[Figure | None] = []
  for report in reports:
    settings = report.settings
    drawn.append(
      figures.quality_against_layers(
        report.tradeoff,
        f"fig3_layers_{settings.name}",
        f"{settings.title}: quality against layers",
        settings.metric_title,
      )
    )
    drawn.append(
      figures.quality_against_seconds(
        report.tradeoff,
        f"fig3_seconds_{settings.name}",
        f"{settings.title}: quality against seconds",
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
      figures.style_of(curve.name).title,
      threshold(point.threshold) if curve.name in report.measures else "–",
      number(point.scores.layers),
      percent(point.scores.quality),
      percent(point.scores.quality_error),
      percent(point.scores.similarity),
      number(point.scores.bleu, 1),
      number(1e3 * point.seconds, 2),
      times(point.speedup),
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
    ),
    rows=rows,
  )


def calibrated_gains(reports: Reports) -> Section:
  """Table 2."""
  return Section(
    "gains",
    "Calibrated gains (Table 2)",
    text=(
      "The threshold is calibrated on one part of the test split and everything else is"
      " measured on the other, which no choice has seen. Textual: the loss is the distance to"
      " the full model's text. Risk: the increase of the loss against references. Method"
      " “paper” tests with Hoeffding-Bentkus, for risk on losses clipped at 0 (Eq. 11);"
      " “auto” tests by betting, for risk on the signed losses of Eq. 2.",
    ),
    tables=tuple(gains_table(report) for report in reports),
  )


def gains_table(report: suite.TaskReport) -> Table:
  """Table 2 for one task."""
  found, settings = report.gains, report.settings
  names = [method.name for method in gains.METHODS]
  columns = ("λ", "risk", "layers", "FLOPs", "decode", "total")
  rows = tuple(
    (
      row.target.consistency,
      f"{row.target.tolerance:g}",
      row.measure,
      *(cell for gain in row.gains for cell in _gain_cells(gain)),
    )
    for row in found.rows
  )
  return Table(
    name=f"table2_{settings.name}",
    title=f"{settings.title}: Table 2",
    columns=("consistency", "δ", "measure", *columns * len(names)),
    groups=(("", 3), *((f"method {name}", len(columns)) for name in names)),
    rows=rows,
    note=(
      f"{found.num_calibration} calibration prompts, {found.num_unseen} unseen ones; ε ="
      f" {found.error_rate:g} in every cell by itself; losses from {settings.metric_title}."
      " λ: the calibrated threshold; “never”: nothing was certified, so the full model serves."
      " FLOPs: of the full model over these, decoder only (calm.t5.costs). Decode, total: the"
      " full model's seconds over these, without and with the encoder, measured on"
      f" {found.num_timed} unseen prompts, each decoded alone."
    ),
    text_columns=3,
  )


def _gain_cells(gain: gains.Gain) -> tuple[str, ...]:
  return (
    threshold(gain.threshold),
    number(gain.risk, 3),
    number(gain.layers),
    times(gain.flops_reduction),
    times(gain.speedup),
    times(gain.end_to_end),
  )


def coloured_outputs(reports: Reports) -> Section:
  """Fig. 4."""
  return Section(
    "outputs",
    "Outputs, token by token (Fig. 4)",
    text=(
      "Every token on the colour of the decoder layers that it took. Move the slider: a lower"
      " threshold lets tokens leave earlier, until the text changes. The measure's calibrated"
      " threshold comes first. D is the distance to the full model's text, R the change of the"
      " loss against the reference (negative: better than the full model).",
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
