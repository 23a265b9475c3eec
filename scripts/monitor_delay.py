"""How soon a watch sees that a promise no longer holds, fresh and after a long good time.

    python scripts/monitor_delay.py --output=scripts/results/NAME.json

Losses are those of texts, mostly unchanged. After `--good` checks at 0.9 of the tolerance their
mean jumps to twice the tolerance; a row shows how many checks pass until the alarm, at alarm
level 0.05, and how many watches gave a false alarm before. Needs numpy and scipy only.
"""

import argparse
import math

import numpy as np
import tables

from calm.calibrate import monitor

COLUMNS = (
  "tolerance",
  "good checks",
  "watches",
  "median delay",
  "longest delay",
  "false alarms",
)
_MOST = 20_000


def losses(generator: np.random.Generator, mean: float, count: int) -> list[float]:
  """Losses in [0, 1] of that mean; two thirds or more are 0 while the mean is small."""
  changed = generator.random(count) < 3.0 * mean
  return (changed * generator.beta(1.5, 3.0, count)).tolist()


def delay(tolerance: float, good: int, seed: int) -> int | None:
  """Checks from the jump to the alarm; None where the alarm came before it."""
  generator = np.random.default_rng([seed, good])
  watch = monitor.Watch(tolerance, 0.05, 1.0, seed="simulation")
  target, wealth = math.log(1.0 / watch.alarm_level), monitor.Wealth()
  for loss in losses(generator, 0.9 * tolerance, good):
    wealth = wealth.after(loss, watch)
  if wealth.highest >= target:
    return None
  for number, loss in enumerate(losses(generator, 2.0 * tolerance, _MOST), start=1):
    wealth = wealth.after(loss, watch)
    if wealth.highest >= target:
      return number
  return _MOST


def row(tolerance: float, good: int, watches: int) -> list[str]:
  """One line of the table."""
  found = [delay(tolerance, good, seed) for seed in range(watches)]
  seen = [value for value in found if value is not None]
  median, longest = (f"{value:.0f}" for value in (np.median(seen), max(seen)))
  false = str(len(found) - len(seen))
  return [f"{tolerance:g}", f"{good:,}", str(watches), median, longest, false]


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--good", type=int, default=100_000, help="checks before the jump")
  parser.add_argument("--watches", type=int, default=20, help="a row (default 20)")
  parser.add_argument("--output", help="JSON file of the table")
  arguments = parser.parse_args()
  rows = []
  for tolerance in (0.05, 0.1):
    for good in (0, arguments.good):
      rows.append(row(tolerance, good, arguments.watches))
      print("  ".join(f"{cell:>13}" for cell in rows[-1]), flush=True)
  if arguments.output:
    tables.write(arguments.output, COLUMNS, rows)


if __name__ == "__main__":
  main()
