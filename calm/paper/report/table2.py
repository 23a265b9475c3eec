"""Table 2: what calibrated thresholds save, with intervals and marks."""

from collections.abc import Sequence

from calm.exits import schedules
from calm.paper.bench import intervals
from calm.paper.experiments import gains, suite
from calm.paper.report import findings
from calm.paper.report.section import Section
from calm.paper.report.tables import Table, number, threshold, times

Reports = Sequence[suite.TaskReport]

# Of the columns `95 %`, which a terminal has no room for.
INTERVALS = (
  " 95 %: intervals from these prompts alone (risk: a betting test on both sides; decode:"
  " prompts drawn with replacement)."
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
    tables=tuple(
      gains_table(report, turn)
      for report in reports
      for turn in reversed(range(len(gains.METHODS)))
    ),
  )


def gains_table(report: suite.TaskReport, turn: int = -1) -> Table:
  """Table 2 for one task and the method at a position of `gains.METHODS`."""
  found, settings = report.gains, report.settings
  turn = turn % len(gains.METHODS)
  method = gains.METHODS[turn].name
  last = turn == len(gains.METHODS) - 1
  rows = tuple(
    (
      row.target.consistency,
      f"{row.target.tolerance:g}",
      row.measure,
      *_gain_cells(row, row.gains[turn]),
    )
    for row in found.rows
  )
  heads = ("λ", "risk", "95 %", "layers", "FLOPs", "decode", "95 %", "total")
  return Table(
    name=f"table2_{settings.name}" if last else f"table2_{method}_{settings.name}",
    title=f"{settings.title}: Table 2, method {method}",
    columns=("consistency", "δ", "measure", *heads),
    rows=rows,
    note=(
      f"{found.num_calibration} calibration prompts, {found.num_unseen} unseen ones; ε ="
      f" {found.error_rate:g} in every cell by itself; losses from {settings.metric_title}."
      " λ: the calibrated threshold; “never”: nothing was certified, so the full model serves."
      " FLOPs: of the full model over these, decoder only (calm.t5.costs). Decode, total: the"
      " full model's seconds over these, without and with the encoder, measured on"
      f" {found.num_timed} unseen prompts, each decoded alone.{INTERVALS}"
      f"{_above_note(found, turn)}"
    ),
    text_columns=3,
  )


def _gain_cells(row: gains.Row, gain: gains.Gain) -> tuple[str, ...]:
  served = gain.threshold != schedules.NEVER_EXIT
  return (
    threshold(gain.threshold),
    number(gain.risk, 3) + mark(row, gain),
    ends(gain.risk_interval, 3) if served else "–",
    number(gain.layers),
    times(gain.flops_reduction),
    times(gain.speedup),
    ends(gain.speedup_interval) if served else "–",
    times(gain.end_to_end),
  )


def _above_note(found: gains.Gains, turn: int) -> str:
  """How many measured risks are above what was promised, and what that means."""
  cells = [(row, row.gains[turn]) for row in found.rows]
  over = [cell for cell in cells if findings.above(*cell)]
  if not over:
    return " No measured risk is above its δ."
  clear = [1 for row, gain in over if gain.risk_interval[0] > row.target.tolerance]
  told = (
    f"in {len(clear)} of them the whole interval is"
    if clear
    else "the intervals of all of them reach below it"
  )
  return (
    f" ▲: {len(over)} of {len(cells)} measured risks are above their δ; {told}. The promise is"
    f" of the expected loss, and a mean over {found.num_unseen} prompts may lie above it."
  )


def ends(interval: intervals.Interval, digits: int = 2) -> str:
  """An interval in a table, or a dash."""
  return findings.ends(interval, digits).strip(" ()") or "–"


def mark(row: gains.Row, gain: gains.Gain) -> str:
  """What a measured risk above the tolerance is marked by."""
  return " ▲" if findings.above(row, gain) else ""
