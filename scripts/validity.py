"""How often each promise is given wrongly, at the boundary where it is hardest
to keep.

    python scripts/validity.py --output=scripts/results/NAME.json
    python scripts/validity.py --orders --output=scripts/results/NAME.json

Every row draws prompts whose risk is exactly what is promised and asks
`calibrate` for a certificate at error rate 0.05: each one is wrong. Of all
draws 0.05 may be and, by chance, three standard errors more; the exit status is
1 if one is above. With `--orders` rows are stored sorted, stratified or
clustered by their losses, and every number of prompts up to 400 is tried; of so
many sizes some lie above by chance, and they may not be more than that
explains. Needs numpy and scipy only.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import laws
import numpy as np
import tables
from scipy import stats

from calm.calibrate import (
  SequenceLosses,
  Support,
  calibrate,
  calibrate_configurations,
  certify,
  clusters,
  methods,
  risks,
)

LEVEL = 0.05
TOLERANCE = 0.1
# Columns of a block, each with a uniform of its own; and of one where all share
# what belongs to a prompt (labels, weights) or to a call (the uniform of a
# randomised test).
COLUMNS = 100
SHARING = 4
COLUMN_NAMES = (
  "promise",
  "losses",
  "prompts",
  "level",
  "wrong",
  "standard error",
  "draws",
)
ORDERS = ("sorted", "stratified", "clustered")


def table(values: np.ndarray, **fields) -> SequenceLosses:
  """Losses whose columns are draws of their own."""
  return SequenceLosses(
    values, np.linspace(1.0, 0.0, values.shape[1]), **fields
  )


class Cell(NamedTuple):
  """One row of the table."""

  promise: str  # what is promised, in words
  losses: str  # of what kind they are
  prompts: int
  # (generator, prompts) -> whether each draw of a block is certified wrongly,
  # or their share.
  wrong: Callable[[np.random.Generator, int], np.ndarray]
  level: float = LEVEL  # what the share may be
  block: int = COLUMNS  # draws that a call of `wrong` makes
  most: int = 10**9  # draws at most, where each is a whole run


def certified(losses, **options) -> np.ndarray:
  """Which columns have p <= level."""
  found = calibrate(losses, error_rate=LEVEL, **options)
  return found.column("p_value") <= LEVEL


def tested(generator, values, support=None, method="auto") -> np.ndarray:
  """Which columns are certified, each with a uniform of its own."""
  declared = support or Support()
  uniform = generator.random(values.shape[1])
  chosen = methods.get_method(method, declared)
  design = chosen.design(TOLERANCE, LEVEL, len(values), declared.upper, uniform)
  return chosen.log_p_values(values, design) <= math.log(LEVEL)


def mean(law, support=None, method="auto"):
  def wrong(generator, count):
    values = law(generator, TOLERANCE, (count, COLUMNS))
    return tested(generator, values, support, method)

  return wrong


def quantile(generator, count):
  values = np.where(generator.random((count, SHARING)) < 0.1, 0.5, 0.05)
  return certified(
    table(values), tolerance=TOLERANCE, promise=risks.Quantile(0.9)
  )


def every_group(generator, count):
  labels = np.where(generator.random(count) < 0.5, "easy", "hard")
  rates = np.where(labels == "hard", TOLERANCE, 0.0)[:, None]
  values = laws.text(generator, rates, (count, SHARING))
  promise = risks.EveryGroup(labels=labels.tolist())
  return certified(table(values), tolerance=TOLERANCE, promise=promise)


def each_group(generator, count):
  labels = ["a" if row % 2 else "b" for row in range(count)]
  losses = table(laws.text(generator, TOLERANCE, (count, SHARING)))
  found = certify.each_group(
    losses, labels, tolerance=TOLERANCE, error_rate=LEVEL
  )
  wrong = [
    one.column("p_value") <= LEVEL / len(found) for one in found.values()
  ]
  return np.any(wrong, axis=0)


def early_exits(generator, count):
  depths = generator.choice([2.0, 4.0, 8.0], (count, SHARING))
  values = laws.text(
    generator, np.where(depths <= 2.0, TOLERANCE, 0.02), depths.shape
  )
  promise = risks.EarlyExits((2.0, 4.0), depths=depths)
  return certified(table(values), tolerance=TOLERANCE, promise=promise)


def tail_mean(generator, count):
  shape = (count, SHARING)  # the worst tenth loses 0.4 on average
  values = np.where(
    generator.random(shape) < 0.1, generator.uniform(0.2, 0.6, shape), 0.0
  )
  return certified(
    table(values), tolerance=0.4, promise=risks.TailMean(0.9, 0.2)
  )


def known_mixture(generator, count):
  often = generator.random(count) < 0.5
  rates = np.where(often, 0.12, 0.04)[:, None]  # 0.1 under the weights
  values = laws.text(generator, rates, (count, SHARING))
  promise = risks.KnownMixture(1.5, weights=np.where(often, 1.5, 0.5))
  return certified(table(values), tolerance=TOLERANCE, promise=promise)


def several_risks(generator, count):
  first = table(laws.text(generator, TOLERANCE, (count, SHARING)), kind="first")
  second = table(laws.text(generator, 0.01, (count, SHARING)), kind="second")
  several = [risks.Risk(first, TOLERANCE), risks.Risk(second, TOLERANCE)]
  found = calibrate(risks=several, error_rate=LEVEL)
  return found.column("p_value") <= LEVEL


def cost(risk: bool):
  def wrong(generator, count):
    shape = (count, SHARING)
    values = laws.text(generator, TOLERANCE if risk else 0.0, shape)
    costs = np.full(shape, 0.1) if risk else generator.beta(2.0, 2.0, shape)
    return certified(
      table(values), tolerance=TOLERANCE, promise=risks.Cost(0.5, costs=costs)
    )

  return wrong


def cluster_means(generator, count):
  values = np.repeat(
    laws.text(generator, TOLERANCE, (count, COLUMNS)), 4, axis=0
  )
  groups = tuple(f"g{row // 4}" for row in range(len(values)))
  return tested(generator, clusters.means(values, groups)[1])


def prompts_of_clusters(generator, count):
  """Clusters of 1 or 5 prompts; those of 5 have three times the risk."""
  sizes = generator.choice([1, 5], count)
  rates = np.where(sizes == 5, 3.0, 1.0) * TOLERANCE / (16.0 / 6.0)
  values = laws.text(
    generator, np.repeat(rates, sizes)[:, None], (sizes.sum(), COLUMNS)
  )
  groups = tuple(f"g{row}" for row in np.repeat(np.arange(count), sizes))
  return tested(generator, clusters.means(values, groups, 5, TOLERANCE)[1])


def one_configuration(generator, count):
  """All configurations are at the boundary, in two families of three."""
  families = {}
  costs = {}
  for name in ("one", "other"):
    values = laws.zero_or_one(generator, TOLERANCE, (count, 3))
    losses = SequenceLosses(
      values, np.array([0.9, 0.6, 0.3]), Support(binary=True)
    )
    families[name] = [risks.Risk(losses, TOLERANCE)]
    costs[name] = generator.random((count, 3))
  found = calibrate_configurations(families, costs, error_rate=LEVEL)
  return np.array([found.certified])


def grid_of_four(generator, count):
  """The whole of `calibrate`: two thresholds within the tolerance, two at
  it.
  """
  values = laws.text(generator, [0.01, 0.05, TOLERANCE, TOLERANCE], (count, 4))
  found = calibrate(
    values, [0.9, 0.7, 0.5, 0.3], tolerance=TOLERANCE, error_rate=LEVEL
  )
  return np.array([found.threshold < 0.7])


CELLS = (
  *(
    Cell("mean", "text", size, mean(laws.text)) for size in (50, 100, 300, 1000)
  ),
  *(
    Cell("mean", "near binary", size, mean(laws.near_binary))
    for size in (50, 300)
  ),
  *(Cell("mean", "dense", size, mean(laws.dense)) for size in (50, 300)),
  *(Cell("mean", "heavy", size, mean(laws.heavy)) for size in (50, 300)),
  *(
    Cell("mean", "signed", n, mean(laws.signed, Support(-1.0)))
    for n in (50, 100, 300)
  ),
  *(
    Cell("mean", "0 or 1, bets", size, mean(laws.zero_or_one))
    for size in (50, 100, 300)
  ),
  Cell(
    "mean",
    "0 or 1, binomial",
    100,
    mean(laws.zero_or_one, Support(binary=True)),
  ),
  Cell(
    "mean, no uniform",
    "text",
    100,
    mean(laws.text, method="betting_fixed_level"),
  ),
  Cell(
    "mean, convex_order", "text", 100, mean(laws.text, method="convex_order")
  ),
  Cell("mean, betting", "text", 100, mean(laws.text, method="betting")),
  Cell("mean, clusters of 4 copies", "text", 100, cluster_means),
  Cell("mean over prompts of clusters", "text", 100, prompts_of_clusters),
  Cell("quantile", "two values", 100, quantile, block=SHARING),
  Cell("every group", "text", 200, every_group, block=SHARING),
  Cell("each group", "text", 200, each_group, block=SHARING),
  Cell("early exits", "text", 300, early_exits, block=SHARING),
  Cell("tail mean", "a worst tenth", 200, tail_mean, block=SHARING),
  Cell("known mixture", "text", 200, known_mixture, block=SHARING),
  Cell("several risks", "text", 100, several_risks, block=SHARING),
  Cell("cost, the risk", "text", 100, cost(risk=True), LEVEL / 2, SHARING),
  Cell(
    "cost, the cost", "Beta(2, 2)", 100, cost(risk=False), LEVEL / 2, SHARING
  ),
  Cell(
    "one of six configurations",
    "0 or 1",
    200,
    one_configuration,
    block=1,
    most=5000,
  ),
  Cell("mean, a grid of four", "text", 100, grid_of_four, block=1, most=2000),
)


def simulate(cell: Cell, draws: int, number: int) -> list:
  """One line of the table."""
  generator = np.random.default_rng([2022, number])
  blocks = max(2, min(draws, cell.most) // cell.block)
  shares = np.array(
    [np.mean(cell.wrong(generator, cell.prompts)) for _ in range(blocks)]
  )
  error = float(shares.std(ddof=1)) / math.sqrt(blocks)
  return line(*cell[:3], cell.level, shares.mean(), error, blocks * cell.block)


def line(promise, losses, prompts, level, rate, error, draws) -> list:
  """A line as the table shows it."""
  shares = (f"{level:g}", f"{rate:.4f}", f"{error:.4f}")
  return [promise, losses, str(prompts), *shares, str(draws)]


def stored(order: str, losses: np.ndarray) -> np.ndarray:
  """The same losses as somebody may have stored them, by nothing but their
  values.
  """
  losses = np.sort(losses, axis=0)
  if order == "sorted":
    return losses
  if order == "stratified":  # as if from ten strata in turn
    return np.concatenate([losses[start::10] for start in range(10)])
  # the worst together, in the middle
  return np.roll(losses, len(losses) // 2, axis=0)


def wrong_in_order(generator, order: str, law, count: int, draws: int) -> float:
  """Share of stored tables that are certified, each in all orders that are made
  for it.
  """
  tables = []
  for _ in range(draws):
    values = stored(order, law(generator, TOLERANCE, (count, 1)))
    losses = SequenceLosses(values, np.array([0.5]))
    rows = clusters.tested_orders(losses)[2]
    tables.append(values[np.stack(rows, axis=1), 0])
  sizes = np.array([table.shape[1] for table in tables])
  values = np.concatenate(tables, axis=1)
  method = methods.get_method("auto", Support())
  log_p = method.log_p_values(
    values, method.design(TOLERANCE, LEVEL, len(values))
  )
  passed = log_p <= math.log(LEVEL)
  return float(
    np.mean(np.logical_and.reduceat(passed, np.cumsum(sizes) - sizes))
  )


def simulate_orders(
  draws: int = 200, most: int = 400
) -> tuple[list[list], bool]:
  """Lines for ranges of sizes, and whether no more sizes lie high than chance
  explains.
  """
  lines = []
  kept = True
  limit = LEVEL + 3.0 * math.sqrt(LEVEL * (1.0 - LEVEL) / draws)
  chance = float(stats.binom.sf(math.floor(limit * draws + 1e-9), draws, LEVEL))
  for law, name in ((laws.text, "text"), (laws.zero_or_one, "0 or 1")):
    for order in ORDERS:
      generator = np.random.default_rng([2023, len(lines)])
      rates = np.array(
        [
          wrong_in_order(generator, order, law, count, draws)
          for count in range(1, most + 1)
        ]
      )
      for low in range(0, most, 100):
        part = rates[low : low + 100]
        spread = math.sqrt(
          part.mean() * (1.0 - part.mean()) / (draws * len(part))
        )
        high = int(np.sum(part > limit + 1e-9))
        kept &= part.mean() <= LEVEL + 3.0 * spread
        kept &= (
          stats.binomtest(high, len(part), chance, alternative="greater").pvalue
          > 1e-3
        )
        sizes = f"{low + 1} to {low + len(part)}"
        told = (LEVEL, part.mean(), spread, draws * len(part))
        extremes = [f"{part.max():.4f}", f"{limit:.4f}", str(high)]
        lines.append(
          [*line(f"mean, stored {order}", name, sizes, *told), *extremes]
        )
        print("  ".join(lines[-1]), flush=True)
  return lines, kept


def main() -> int:
  """Command line; returns the process's exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--draws", type=int, default=20_000, help="a row (default %(default)s)"
  )
  parser.add_argument(
    "--orders", action="store_true", help="stored orders at every size"
  )
  parser.add_argument("--output", help="JSON file of the table")
  arguments = parser.parse_args()
  if arguments.orders:
    rows, kept = simulate_orders()
  else:
    rows = []
    kept = True
    for number, cell in enumerate(CELLS):
      rows.append(simulate(cell, arguments.draws, number))
      *_, level, rate, error, _ = rows[-1]
      kept &= float(rate) <= float(level) + 3.0 * float(error) + 5e-5
      print("  ".join(rows[-1]), flush=True)
  if arguments.output:
    more = (
      ["most at one size", "level + 3 errors", "sizes above"]
      if arguments.orders
      else []
    )
    tables.write(arguments.output, [*COLUMN_NAMES, *more], rows)
  print(
    "every share is within three errors of its level"
    if kept
    else "a share is too large"
  )
  return 0 if kept else 1


if __name__ == "__main__":
  sys.exit(main())
