"""Decoder layers that risk control of others and of calm certifies, and how
often wrongly.

    python scripts/compare_peers.py --output=scripts/results/compare_peers.json
        \\ --cached synopses:textual:rouge_l=runs/synopses
        answers:textual:token_f1=runs/qa

Each row draws prompts, again and again, from a law of losses or, without
replacement, from cached outputs of `calm generate`; every method chooses a
threshold of the same grid at error rate 0.05. Cells are mean layers a token,
lower is better, and in brackets, above zero, the share of draws whose threshold
has a risk above the tolerance: at most 0.05 is promised by all but `CRC`, which
promises the mean alone. Of cached outputs the risk is that of all prompts.

`MAPIE` is its p-value with fixed sequence testing, as it is installed (`pip
install mapie`); its default, Holm, is `MAPIE Holm`. `WSR` is RC-EENN's bound
(Jazbec et al. 2024, from Waudby-Smith and Ramdas 2024) and `STaR` the bets of
Voracek 2025, each with the same fixed sequence; RC-EENN's other way is `CRC`.
`binomial` knows that losses are 0 or 1. `oracle` knows the risks.
"""

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import laws
import numpy as np
import tables

from calm.calibrate import (
  SequenceLosses,
  Support,
  calibrate,
  generations,
  losses,
)

mapie = fwer_control = None
with contextlib.suppress(ImportError):  # its columns are then empty
  from mapie.risk_control import fwer_control  # pyright: ignore[reportMissingImports]
  from mapie.risk_control import methods as mapie  # pyright: ignore[reportMissingImports]

LEVEL = 0.05
SIZES = (50, 100, 300, 1000)
TOLERANCES = (0.05, 0.1)
# thresholds of a law: risks from a tenth of the tolerance to twice the
# tolerance
STEPS = 20
# layers at full depth, then at each threshold
DEPTHS = 8.0 - 0.3 * np.arange(STEPS + 1)


class Source(NamedTuple):
  """What losses are drawn from."""

  name: str  # of the law or the outputs
  # (generator, prompts) -> [prompts, thresholds] losses.
  draw: Callable[[np.random.Generator, int], np.ndarray]
  risks: np.ndarray  # [thresholds] true risks
  # [1 + thresholds] mean layers at full depth and at each threshold
  depths: np.ndarray
  support: Support  # what is known of the losses


def of_law(name: str, tolerance: float) -> Source:
  """A law whose risk rises from threshold to threshold."""
  risks = tolerance * np.arange(1, STEPS + 1) / 10.0
  if name == "heavy":
    risks = np.maximum(risks, 0.021)

  def draw(generator: np.random.Generator, count: int) -> np.ndarray:
    return laws.BY_NAME[name](generator, risks, (count, STEPS))

  lower = -1.0 if name == "signed" else 0.0
  return Source(name, draw, risks, DEPTHS, Support(lower=lower))


def of_outputs(text: str) -> Source:
  """Cached outputs, from NAME:KIND:METRIC=FOLDER."""
  about, _, folder = text.partition("=")
  name, kind, metric = about.split(":")
  cached = generations.load(folder)
  table = losses.compute(cached, kind, metric=metric)
  counts = cached.layer_counts()
  if counts is None:
    raise ValueError(
      f"Expected outputs with `exit_layers` in {folder}, got none."
    )
  full = max(max(record.exit_layers or (0,)) for record in cached.full)
  depths = np.array([full, *(counts[0].sum(axis=0) / counts[1].sum(axis=0))])

  def draw(generator: np.random.Generator, count: int) -> np.ndarray:
    return table.values[
      generator.choice(len(table.values), count, replace=False)
    ]

  return Source(name, draw, table.values.mean(axis=0), depths, table.support)


def first_failure(passes: np.ndarray) -> int:
  """Thresholds that fixed sequence testing certifies."""
  return len(passes) if passes.all() else int(np.argmin(passes))


def wsr(values: np.ndarray, tolerance: float, star: bool = False) -> int:
  """Thresholds certified by WSR's plug-in bets for one level, or by STaR's."""
  count = len(values)
  rows = np.arange(1, count + 1)[:, None]
  means = (0.5 + values.cumsum(axis=0)) / (rows + 1)
  spread = (0.25 + np.square(values - means).cumsum(axis=0)) / (rows + 1)
  spread = np.vstack([np.full((1, values.shape[1]), 0.25), spread[:-1]])
  target = math.log(1.0 / LEVEL)
  wealth = np.zeros(values.shape[1])
  highest = wealth.copy()
  for row, loss in enumerate(values):
    needed = np.maximum(target - wealth, 1e-12) if star else target
    left = count - row if star else count
    bets = np.minimum(1.0, np.sqrt(2.0 * needed / (left * spread[row])))
    wealth = wealth + np.log1p(bets * (tolerance - loss))
    highest = np.maximum(highest, wealth)
  return first_failure(highest >= target)


def mapie_sequence(
  values: np.ndarray, tolerance: float, holm: bool = False
) -> int | None:
  """Thresholds certified by MAPIE; by Holm, the number of the last one that it
  names.
  """
  if mapie is None or fwer_control is None:
    return None
  binary = bool(np.isin(values, (0.0, 1.0)).all())
  clipped = np.maximum(values, 0.0)  # its p-value is for losses in [0, 1]
  found = mapie.compute_hoeffding_bentkus_p_value(
    clipped.mean(axis=0), len(values), tolerance, binary
  )[:, 0]
  procedure = "bonferroni_holm" if holm else "fixed_sequence"
  named = fwer_control.control_fwer(found, LEVEL, procedure)
  return int(max(named, default=-1)) + 1


def crc(values: np.ndarray, tolerance: float) -> int:
  """Conformal risk control (Angelopoulos et al. 2024): the mean over draws
  stays within.
  """
  count = len(values)
  bound = (count * values.mean(axis=0) + 1.0) / (count + 1)
  return first_failure(bound <= tolerance)


def ours(
  values: np.ndarray, tolerance: float, method: str, support: Support
) -> int:
  """Thresholds certified by `calibrate`."""
  table = SequenceLosses(
    values, np.linspace(1.0, 0.0, values.shape[1]), support
  )
  found = calibrate(table, tolerance=tolerance, error_rate=LEVEL, method=method)
  return first_failure(np.array([row.rejected for row in found.rows]))


def chosen(
  source: Source, values: np.ndarray, tolerance: float
) -> dict[str, int | None]:
  """{method: thresholds that it certifies, the last of which is served}."""
  binary = bool(np.isin(values, (0.0, 1.0)).all())
  return {
    "paper": ours(values, tolerance, "paper", source.support),
    "MAPIE": mapie_sequence(values, tolerance),
    "MAPIE Holm": mapie_sequence(values, tolerance, holm=True),
    "WSR": wsr(values, tolerance),
    "STaR": wsr(values, tolerance, star=True),
    "no uniform": ours(
      values, tolerance, "betting_fixed_level", source.support
    ),
    "auto": ours(values, tolerance, "auto", source.support),
    "binomial": ours(values, tolerance, "binomial", Support(binary=True))
    if binary
    else None,
    "CRC": crc(values, tolerance),
    "oracle": first_failure(source.risks <= tolerance),
  }


def row(source: Source, tolerance: float, size: int, draws: int) -> list[str]:
  """One line of the table."""
  generator = np.random.default_rng([23, size, round(1000 * tolerance)])
  found = [
    chosen(source, source.draw(generator, size), tolerance)
    for _ in range(draws)
  ]
  above = np.array([0.0, *source.risks]) > tolerance + 1e-12
  cells = []
  for method in METHODS:
    counts = [each[method] for each in found]
    if None in counts:
      cells.append("")
      continue
    places = np.array(counts, int)
    wrong = above[places].mean()
    cells.append(
      f"{source.depths[places].mean():.2f}"
      + (f" ({wrong:.3f})" if wrong else "")
    )
  return [source.name, f"{tolerance:g}", str(size), *cells]


METHODS = (
  *(
    "paper",
    "MAPIE",
    "MAPIE Holm",
    "WSR",
    "STaR",
    "no uniform",
    "auto",
    "binomial",
  ),
  *("CRC", "oracle"),
)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--draws", type=int, default=400, help="draws a row (default 400)"
  )
  parser.add_argument(
    "--laws", nargs="*", default=list(laws.BY_NAME), help="laws of losses"
  )
  parser.add_argument(
    "--cached", nargs="*", default=[], help="NAME:KIND:METRIC=FOLDER"
  )
  parser.add_argument("--output", help="JSON file of the table")
  arguments = parser.parse_args()
  outputs = [of_outputs(text) for text in arguments.cached]
  sources = [
    *(
      lambda tolerance, name=name: of_law(name, tolerance)
      for name in arguments.laws
    ),
    *(lambda _, source=source: source for source in outputs),
  ]
  columns = ["losses", "tolerance", "prompts", *METHODS]
  rows = []
  print("  ".join(f"{cell:>12}" for cell in columns))
  for make, tolerance, size in itertools.product(sources, TOLERANCES, SIZES):
    rows.append(row(make(tolerance), tolerance, size, arguments.draws))
    print("  ".join(f"{cell:>12}" for cell in rows[-1]), flush=True)
  if arguments.output:
    tables.write(
      arguments.output, columns, rows, packages=("numpy", "scipy", "mapie")
    )


if __name__ == "__main__":
  main()
