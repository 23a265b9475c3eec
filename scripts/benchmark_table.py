"""Rows of `benchmark.py`, as Markdown and as `scripts/results` keeps them."""

import dataclasses
import math
import statistics
from typing import Any

from scipy import stats


@dataclasses.dataclass
class Row:
  """One row of the table; times are of the decoder alone, in milliseconds a step.

  Attributes:
    setting, system: where and what.
    peer: somebody else's.
    layers: mean decoder layers a token.
    median, low, high: milliseconds a step, over the repeats.
    end_to_end: the same with the encoder, median.
    compile_seconds: the first run less a later one.
    megaflops: of a token, from `calm.t5.costs` and the exits taken; None for peers.
    megabytes: weights and caches that a step must read and write; None for peers.
    floor: milliseconds a step that this takes; None for peers.
    gigabytes_per_second: the speed of the floor, the fastest reading of the run.
    over_static: time over that of the static model of the same mean depth.
    over_full: time over that of our full depth.
    agreement: share of tokens equal to our full depth's; None where depths differ.
    against: how many times as long a chosen row takes, None where none was chosen.
    against_whole: the same with both encoders.
  """

  setting: str
  system: str
  peer: bool
  layers: float | None
  median: float
  low: float
  high: float
  end_to_end: float | None
  compile_seconds: float
  megaflops: float | None = None
  megabytes: float | None = None
  floor: float | None = None
  gigabytes_per_second: float = 0.0
  over_static: float | None = None
  over_full: float | None = None
  agreement: float | None = None
  against: "Ratio | None" = None
  against_whole: "Ratio | None" = None


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Times of one row over those of another, taken repeat by repeat.

  Attributes:
    median: of the repeats.
    low, high: a 95 % interval of that median which supposes no distribution (order statistics);
      None where there are too few repeats for one.
  """

  median: float
  low: float | None
  high: float | None

  def __str__(self) -> str:
    if self.low is None or self.high is None:
      return f"{self.median:.2f}"
    return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(theirs: list[float], ours: list[float]) -> Ratio:
  """How many times as long theirs took, repeat by repeat."""
  ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
  interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
  ends = (None if math.isnan(end) else float(end) for end in (interval.low, interval.high))
  return Ratio(statistics.median(ratios), *ends)


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
  """The table, one block a setting."""
  versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
  lines = [
    f"{about['cpu']}, {about['cores']} cores; {about['device']}; {versions}."
    f" Load when it began: {about['load_before']:.1f}. `{about['command']}`",
    "",
    "Milliseconds a decode step: median of the repeats (lowest - highest), encoder excluded.",
  ]
  lines += [f"Not installed: {peer}." for peer in about["not_installed"]]
  for setting in dict.fromkeys(row.setting for row in rows):
    lines += [
      "",
      f"**{setting}** (memory was read at {_speed(rows, setting):.1f} GB/s)",
      "",
      "| system | layers | MFLOP a token | MB a step | ms a step | spread | x static | x full |"
      " x floor | end to end | compile s | tokens equal | against | with encoders |",
      "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_markdown_row(row) for row in rows if row.setting == setting]
  return "\n".join(lines) + "\n"


def result(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
  """The rows as `scripts/tables.py` shows them."""
  columns = {
    "setting": lambda row: row.setting,
    "system": lambda row: row.system,
    "layers": lambda row: row.layers,
    "ms a step": lambda row: row.median,
    "over static": lambda row: row.over_static,
    "over full depth": lambda row: row.over_full,
    "with the encoder": lambda row: row.end_to_end,
    "compile s": lambda row: row.compile_seconds,
  }
  if any(row.against for row in rows):
    columns[f"{about['against']} over it"] = lambda row: str(row.against or "")
    columns["with both encoders"] = lambda row: str(row.against_whole or "")
    columns["tokens equal"] = lambda row: row.agreement
  return {
    "command": about["command"],
    "columns": list(columns),
    "rows": [[read(row) for read in columns.values()] for row in rows],
    "versions": about["versions"],
    "machine": f"{about['cpu']}, {about['cores']} cores",
  }


def _speed(rows: list[Row], setting: str) -> float:
  return next(row.gigabytes_per_second for row in rows if row.setting == setting)


def _markdown_row(row: Row) -> str:
  number = lambda value, places=2: "" if value is None else f"{value:.{places}f}"
  over_floor = None if row.floor is None else row.median / row.floor
  share = "" if row.agreement is None else f"{100 * row.agreement:.1f} %"
  cells = [
    f"*{row.system}*" if row.peer else row.system,
    number(row.layers),
    number(row.megaflops, 1),
    number(row.megabytes, 1),
    number(row.median),
    f"{row.low:.2f} - {row.high:.2f}",
    *(number(value) for value in (row.over_static, row.over_full, over_floor)),
    number(row.end_to_end),
    number(row.compile_seconds, 1),
    share,
    str(row.against or ""),
    str(row.against_whole or ""),
  ]
  return "| " + " | ".join(cells) + " |"
