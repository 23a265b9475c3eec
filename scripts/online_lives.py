"""Lives of `calibrate.Online`: how often it errs, what it costs, how soon it
sees a change.

    python scripts/online_lives.py --table=cost
    --output=scripts/results/NAME.json

`wrong`: the risk of the last threshold is the tolerance, so that it may be
named in at most 0.05 of all lives, ever; `whole` is of lives with late and
missing losses, clusters and changes. `cost`: checks until a threshold is
certified, beside the prompts with which one batch calibration certifies it in
80 % of draws. `share`: checks per 1,000 prompts. `delay`: checks from a change
to the alarm. Needs numpy and scipy only.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
from collections.abc import Iterator

import laws
import numpy as np
import tables

from calm.calibrate import Online, Support, methods, online

ERROR_RATE = 0.05
LAWS = ("text", "near binary", "dense")


def at_the_bound(law: str, tolerance: float, lives: int, checks: int) -> float:
  """Share of lives that ever certify a threshold of that risk, all followed at
  once.
  """
  generator = np.random.default_rng(
    [52, checks, round(1000 * tolerance), len(law)]
  )
  wealth = online.Wealth(1.0 / (1.0 - tolerance), (lives,))
  for _ in range(checks):
    wealth.bet(
      tolerance - laws.BY_NAME[law](generator, tolerance, (1, lives))[0]
    )
  target = -math.log(online.life_level(ERROR_RATE, 0))
  return float(np.mean(wealth.highest >= target))


def live(kind: str, seed: int, prompts: int) -> bool:
  """One whole life of a state: whether it ever named the threshold at the
  bound.
  """
  generator = np.random.default_rng([53, seed])
  tolerance = 0.1
  state = Online(
    None,
    [0.9, 0.5],
    tolerance=tolerance,
    share=0.9,
    seed=str(seed),
    patience=20,
  )
  change = kind == "a change at half time"
  wrong = False
  clusters = kind == "clusters of 4 equal prompts"
  late = {}
  losses = []
  for number in range(prompts):
    risk = tolerance
    if change and state.life == 0:  # after the alarm the risk is at the bound
      risk = 0.02 if number < prompts // 2 else 0.3
    if not (clusters and number % 4):
      losses = [float(value) for value in generator.random(2) < (0.02, risk)]
    wrong |= state.threshold == 0.5 and (state.life > 0 or not change)
    name = number // 4 if clusters else number
    if state.should_check(name):
      late[name] = dict(zip((0.9, 0.5), losses, strict=True))
      if kind == "missing at random" and generator.random() < 0.02:
        late[name] = None
      elif kind == "missing where the text is lost" and losses[1]:
        del late[name]
    if kind != "late losses" or generator.random() < 0.3:
      for each in generator.permutation(list(late)).tolist():
        state.observe(each, late.pop(each))
  return wrong


KINDS = (
  "clusters of 4 equal prompts",
  "late losses",
  "missing at random",
  "missing where the text is lost",
  "a change at half time",
)


def wrong_table(lives: int) -> Iterator[list[str]]:
  """Columns and rows of `wrong`."""
  yield ["losses", "tolerance", "checks", "lives", "wrong", "standard error"]
  for law, tolerance in itertools.product(laws.BY_NAME, (0.05, 0.1)):
    share = at_the_bound(law, tolerance, lives, 2000)
    yield [
      law,
      str(tolerance),
      "2000",
      str(lives),
      f"{share:.4f}",
      error(share, lives),
    ]


def whole_table(lives: int) -> Iterator[list[str]]:
  """Columns and rows of `whole`."""
  yield [
    "losses of 0 or 1",
    "tolerance",
    "prompts",
    "lives",
    "wrong",
    "standard error",
  ]
  with multiprocessing.Pool() as pool:
    for kind in KINDS:
      found = pool.map(
        functools.partial(live, kind, prompts=1000), range(lives)
      )
      share = float(np.mean(found))
      yield [
        kind,
        "0.1",
        "1000",
        str(lives),
        f"{share:.4f}",
        error(share, lives),
      ]


def error(share: float, count: int) -> str:
  return f"{math.sqrt(share * (1.0 - share) / count):.4f}"


def certified(
  law: str, tolerance: float, mean: float, size: int, draws: int
) -> float:
  """Share of batches of so many prompts that are certified without a
  uniform.
  """
  generator = np.random.default_rng([54, size])
  losses = laws.BY_NAME[law](generator, mean, (size, draws))
  method = methods.get_method("betting_fixed_level", Support())
  design = method.design(tolerance, ERROR_RATE, size)
  return float(np.mean(method.log_p_values(losses, design) <= math.log(0.05)))


def batch_size(law: str, tolerance: float, mean: float, draws: int) -> int:
  """Prompts with which a batch is certified in 80 % of draws, to 2 %."""
  low = 8
  high = 16
  while certified(law, tolerance, mean, high, draws) < 0.8:
    low, high = high, 2 * high
  while high - low > max(1, high // 50):
    middle = (low + high) // 2
    enough = certified(law, tolerance, mean, middle, draws) >= 0.8
    low, high = (low, middle) if enough else (middle, high)
  return high


def cost_table(lives: int) -> Iterator[list[str]]:
  """Columns and rows of `cost`."""
  names = ("median", "mean", "80 %")
  ratios = (f"{name} / batch" for name in names)
  yield ["losses", "tolerance", "risk", "batch", *names, *ratios]
  for law, tolerance, share in (
    *((law, 0.1, part) for law in LAWS for part in (0.3, 0.5, 0.7)),
    *((law, 0.05, 0.5) for law in LAWS),
  ):
    mean = share * tolerance
    batch = batch_size(law, tolerance, mean, 1000)
    most = 0
    generator = np.random.default_rng([55, round(1e4 * mean)])
    wealth = online.Wealth(1.0 / (1.0 - tolerance), (lives,))
    target = -math.log(online.life_level(ERROR_RATE, 0))
    found = np.full(lives, np.inf)
    while np.isinf(found).any() and most < 40 * batch:
      most += 1
      wealth.bet(tolerance - laws.BY_NAME[law](generator, mean, (1, lives))[0])
      found[np.isinf(found) & (wealth.highest >= target)] = most
    found[np.isinf(found)] = most
    quantiles = (np.median(found), found.mean(), np.quantile(found, 0.8))
    cells = (f"{each:.0f}" for each in quantiles)
    shares = (f"{each / batch:.2f}" for each in quantiles)
    yield [law, f"{tolerance:g}", f"{mean:g}", str(batch), *cells, *shares]


def share_table(lives: int) -> Iterator[list[str]]:
  """Checks per 1,000 served prompts, of a grid whose last thresholds cannot be
  certified.
  """
  blocks = (1, 2, 5, 10, 20)
  counts = np.zeros(20)
  named = []
  for seed in range(lives):
    generator = np.random.default_rng([56, seed])
    state = Online(
      None, [0.9, 0.7, 0.5, 0.3, 0.1], tolerance=0.1, seed=str(seed)
    )
    risks = np.array([0.0, 0.02, 0.05, 0.12, 0.3])
    for number in range(20_000):
      if state.should_check(number):
        counts[number // 1000] += 1
        losses = (generator.random() < risks).astype(float).tolist()
        names = (0.9, 0.7, 0.5, 0.3, 0.1)
        state.observe(number, dict(zip(names, losses, strict=True)))
      if number + 1 in (1000, 5000):
        named.append(state.threshold)
  cells = [f"{counts[block - 1] / lives:.0f}" for block in blocks]

  def share(at):
    return f"{np.mean([level == 0.5 for level in named[at::2]]):.2f}"

  names = (f"thousand {block}" for block in blocks)
  yield [*names, "names 0.5 after 1,000", "after 5,000", "states"]
  yield [*cells, share(0), share(1), str(lives)]


def delay_table(lives: int) -> Iterator[list[str]]:
  """Columns and rows of `delay`."""
  names = (
    "tolerance",
    "good checks",
    "median delay",
    "95 % of delays",
    "false alarms",
  )
  yield [*names, "lives"]
  for tolerance, good in itertools.product((0.05, 0.1), (0, 1000, 20_000)):
    generator = np.random.default_rng([57, good])
    alarm = online.Wealth(1.0 / tolerance, (lives,), restarts=True)
    for _ in range(good):
      alarm.bet(
        laws.text(generator, 0.5 * tolerance, (1, lives))[0] - tolerance
      )
    false = alarm.highest >= math.log(20.0)
    found = np.where(false, -1.0, np.inf)
    count = 0
    while np.isinf(found).any():
      count += 1
      alarm.bet(
        laws.text(generator, 2.0 * tolerance, (1, lives))[0] - tolerance
      )
      found[np.isinf(found) & (alarm.highest >= math.log(20.0))] = count
    seen = found[~false]
    middle = f"{np.median(seen):.0f}"
    late = f"{np.quantile(seen, 0.95):.0f}"
    yield [
      f"{tolerance:g}",
      f"{good:,}",
      middle,
      late,
      f"{false.mean():.4f}",
      str(lives),
    ]


TABLES = {
  "wrong": (wrong_table, 10_000),
  "whole": (whole_table, 10_000),
  "cost": (cost_table, 2000),
  "share": (share_table, 40),
  "delay": (delay_table, 1000),
}


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--table", choices=TABLES, required=True)
  parser.add_argument("--lives", type=int, help="lives a row")
  parser.add_argument("--output", help="JSON file of the table")
  arguments = parser.parse_args()
  make, lives = TABLES[arguments.table]
  rows = []
  for row in make(arguments.lives or lives):
    rows.append(row)
    print("  ".join(f"{cell:>11}" for cell in row), flush=True)
  if arguments.output:
    tables.write(arguments.output, rows[0], rows[1:])


if __name__ == "__main__":
  main()
