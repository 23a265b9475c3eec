"""Bets for one level side by side: how often they certify, and how often wrongly.

    python scripts/compare_bets.py --output=scripts/results/compare_bets.json

For each law of losses, sample size and mean: the share of samples that each rule certifies at
error rate 0.05. Means below the tolerance show power; a mean at the tolerance shows the rate of
false certificates, which must not exceed 0.05. Needs numpy and scipy only.
"""

import argparse
import math

import numpy as np
import tables
from scipy import special

from calm.calibrate import betting

ERROR_RATE = 0.05
COLUMNS = (
  *("law", "tolerance", "mean", "prompts", "plug-in", "WSR", "STaR", "digital"),
  *("fixed level", "auto"),
)
# Prompts at which the better rules certify about four samples in five.
CELLS = (
  ("text", 0.1, 0.3, 50),
  ("text", 0.1, 0.5, 100),
  ("near binary", 0.1, 0.3, 100),
  ("dense", 0.1, 0.4, 50),
  ("text", 0.05, 0.5, 237),
  ("text", 0.05, 0.7, 610),
  ("near binary", 0.05, 0.5, 467),
  ("near binary", 0.05, 0.7, 1290),
  ("dense", 0.05, 0.5, 135),
  ("dense", 0.05, 0.7, 235),
  ("text", 0.1, 0.7, 250),
  ("near binary", 0.1, 0.7, 560),
)


def draw(law: str, generator: np.random.Generator, mean: float, shape: tuple[int, int]):
  """Losses in [0, 1] with that mean."""
  if law == "text":  # most texts are unchanged
    return (generator.random(shape) < 3.0 * mean) * generator.beta(1.5, 3.0, shape)
  if law == "near binary":  # F1 of short answers
    changed = generator.random(shape) < mean / 0.875
    return changed * np.where(generator.random(shape) < 0.75, 1.0, 0.5)
  return generator.beta(20.0 * mean, 20.0 * (1.0 - mean), shape)  # all change a little


def looking(rule: str):
  """STaR-Bets (Voracek 2025) or Browne's hedge (1999), with the plug-in variance."""

  def free(losses: np.ndarray, design: betting.Design) -> np.ndarray:
    bets = betting.plug_in_bets(losses, design)
    bets /= math.sqrt(2.0 * design.target / design.planned_size)  # 1 / standard deviation
    wealth = np.zeros(losses.shape[1])
    for row, loss in enumerate(losses):
      needed = np.maximum(design.target - wealth, 1e-12)
      if rule == "STaR":
        aim = np.sqrt(2.0 * needed)
      else:
        z = special.ndtri_exp(-needed)
        aim = math.sqrt(2.0 / math.pi) / special.erfcx(-z / math.sqrt(2.0))
      bets[row] *= aim / math.sqrt(design.planned_size - row)
      wealth += np.log1p(np.minimum(bets[row], design.cap) * (design.tolerance - loss))
    return bets

  return betting.Strategy(rule, free, betting.HEDGE_CAP_SHARE)


RULES = (
  betting.PLUG_IN,
  betting.Strategy("WSR", betting.plug_in_bets, betting.HEDGE_CAP_SHARE),
  looking("STaR"),
  looking("digital"),
  betting.FIXED_LEVEL,
)


def row(law: str, tolerance: float, share: float, size: int, draws: int) -> list[str]:
  """One line of the table."""
  generator = np.random.default_rng([size, round(100 * share)])
  losses = draw(law, generator, share * tolerance, (size, draws))
  found = []
  for rule in RULES:
    design = rule.design(tolerance, ERROR_RATE, size)
    wealth = betting.log_wealth(losses, design, rule)
    certified = wealth.max(axis=0) >= design.target
    found.append(f"{certified.mean():.4f}")
  certified |= wealth[-1] >= design.target + np.log(generator.random(draws))
  found.append(f"{certified.mean():.4f}")
  return [law, f"{tolerance:g}", f"{share * tolerance:g}", str(size), *found]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--draws", type=int, default=2000, help="samples a row for power")
  parser.add_argument("--boundary", type=int, default=20_000, help="samples a row at the bound")
  parser.add_argument("--output", help="JSON file of the table")
  arguments = parser.parse_args()
  columns, rows = table(arguments)
  for line in (list(columns), *rows):
    print("  ".join(f"{cell:>11}" for cell in line))
  if arguments.output:
    tables.write(arguments.output, columns, rows)


def table(arguments: argparse.Namespace) -> tuple[tuple[str, ...], list[list[str]]]:
  """(columns, rows) of the table that is asked for."""
  rows = [row(*cell, arguments.draws) for cell in CELLS]
  for law in ("text", "near binary", "dense"):
    for tolerance, size in ((0.05, 100), (0.1, 300)):
      rows.append(row(law, tolerance, 1.0, size, arguments.boundary))
  return COLUMNS, rows


if __name__ == "__main__":
  main()
