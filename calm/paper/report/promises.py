"""Does the promise hold? Appendix B as a section."""

import dataclasses
from collections.abc import Sequence

from matplotlib import axes as mpl_axes

from calm.paper.experiments import suite, validity
from calm.paper.report import figures, findings
from calm.paper.report.figures import INK, Figure
from calm.paper.report.section import Section
from calm.paper.report.tables import Table, number, percent

Reports = Sequence[suite.TaskReport]


def promises_kept(reports: Reports) -> Section:
  """App. B: both figures of validity."""
  drawn = [
    figure for report in reports for figure in (risk_figure(report), violations_figure(report))
  ]
  return Section(
    "validity",
    "Does the promise hold? (App. B)",
    text=(
      "Risk: 50 random splits of the test prompts, 80 % to calibrate on and 20 % to look at."
      " What is found stays below the tolerance, the dotted line, by as much as the test of the"
      " threshold is cautious. Failures: calibration sets drawn with replacement, so that the"
      " true risk is known. The share of sets whose threshold breaks the tolerance must not"
      " exceed ε; bars are 95 % intervals.",
    ),
    figures=tuple(drawn),
    tables=tuple(validity_table(report) for report in reports),
  )


def _methods(report: suite.TaskReport, method: str) -> list[validity.MethodTrials]:
  return [entry for entry in report.validity.trials if entry.method == method]


def risk_figure(report: suite.TaskReport) -> Figure:
  """Figure (a), method 'auto': mean and spread of the risk on the test part."""
  found, entries = report.validity, _methods(report, "auto")

  def paint(axes: mpl_axes.Axes) -> None:
    styles = figures.styles_of(report.measures)
    for entry in entries:
      figures.bars(
        axes,
        styles[entry.measure],
        [split.tolerance for split in entry.splits],
        [split.risk_mean for split in entry.splits],
        [
          (split.risk_mean - split.risk_spread, split.risk_mean + split.risk_spread)
          for split in entry.splits
        ],
      )
    top = max(split.tolerance for entry in found.trials for split in entry.splits)
    axes.plot([0, top], [0, top], color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("tolerance δ")
    axes.set_ylabel("risk on the test part")

  return figures.draw(
    f"validity_risk_{report.settings.name}",
    findings.risks(entries, report.settings.title),
    f"{found.num_prompts} prompts, textual consistency, method auto. Bars: standard deviation"
    " over 50 splits, which is partly the test part's own noise.",
    paint,
  )


def violations_figure(report: suite.TaskReport) -> Figure:
  """Figure (b), method 'auto': share of violations with its interval."""
  found, entries = report.validity, _methods(report, "auto")

  def paint(axes: mpl_axes.Axes) -> None:
    styles = figures.styles_of(report.measures)
    for turn, entry in enumerate(entries):
      shift = 0.004 * (turn - (len(entries) - 1) / 2)  # or the bars would cover each other
      figures.bars(
        axes,
        dataclasses.replace(styles[entry.measure], line="none"),
        [trial.tolerance + shift for trial in entry.validity],
        [100 * trial.share for trial in entry.validity],
        [(100 * trial.interval[0], 100 * trial.interval[1]) for trial in entry.validity],
      )
    axes.axhline(100 * found.error_rate, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tolerance δ")
    axes.set_ylabel("violations, % of the draws")

  draws = found.trials[0].validity[0].trials if found.trials else 0
  return figures.draw(
    f"validity_share_{report.settings.name}",
    findings.violations(entries, report.settings.title, found.error_rate),
    f"{draws} calibration sets of {found.calibration_size} prompts, method auto. Dotted: ε."
    " The promise fails by chance in at most that share.",
    paint,
  )


def validity_table(report: suite.TaskReport) -> Table:
  """Both figures as numbers, all methods."""
  rows = tuple(
    (
      entry.measure,
      entry.method,
      f"{split.tolerance:g}",
      number(split.risk_mean, 3),
      number(split.risk_spread, 3),
      number(split.layers_mean),
      number(split.layers_spread),
      percent(split.certified_share, 0),
      percent(trial.share),
      f"{percent(trial.interval[0])} - {percent(trial.interval[1])}",
    )
    for entry in report.validity.trials
    for split, trial in zip(entry.splits, entry.validity, strict=True)
  )
  return Table(
    name=f"validity_{report.settings.name}",
    title=f"{report.settings.title}: risk, layers and violations per δ",
    columns=(
      *("measure", "method", "δ", "risk", "± s.d.", "layers", "± s.d.", "certified, %"),
      *("violations, %", "95 % interval"),
    ),
    groups=(("", 3), ("50 splits, 80 / 20", 5), ("draws from a known pool", 2)),
    rows=rows,
    text_columns=2,
  )
