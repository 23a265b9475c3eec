"""How fast calibration is: p-values, whole calibrations, repeated ones, and text metrics.

python scripts/benchmark_calibrate.py --prompts=100000 --thresholds=50
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from calm.calibrate import SequenceLosses, betting, calibrate, metrics, trials


def clock(name: str, work: Callable[[], Any]) -> None:
  """Prints the seconds of one piece of work."""
  started, used = time.perf_counter(), time.process_time()
  work()
  seconds, used = time.perf_counter() - started, time.process_time() - used
  print(f"{name:<50} {seconds:8.3f} s, {used:7.3f} s of CPU", flush=True)


def main() -> None:
  """Runs every measurement."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--prompts", type=int, default=10_000)
  parser.add_argument("--thresholds", type=int, default=100)
  flags = parser.parse_args()
  generator, shape = np.random.default_rng(0), (flags.prompts, flags.thresholds)
  shares = np.linspace(0.0, 0.3, flags.thresholds)
  losses = (generator.random(shape) < shares) * generator.random(shape)
  grid = np.linspace(0.99, 0.0, flags.thresholds)
  print(f"{flags.prompts} prompts x {flags.thresholds} thresholds")
  clock("p-values, betting", lambda: betting.p_value(losses, 0.1))
  pool = SequenceLosses(losses[:2000, ::5], grid[::5])
  for method in ("auto", "paper"):
    clock(
      f"calibrate, method {method}",
      lambda m=method: calibrate(losses, grid, tolerance=0.1, error_rate=0.05, method=m),
    )
    for repeated in (trials.split_trials, trials.validity_trials):
      clock(
        f"{repeated.__name__}, {method}",
        lambda r=repeated, m=method: r(pool, [0.05, 0.1], error_rate=0.05, method=m),
      )
  texts = [" ".join(f"w{k}" for k in row) for row in generator.integers(0, 400, (40_000, 12))]
  pairs = [(text, (other,)) for text, other in zip(texts[::2], texts[1::2], strict=True)]
  for name in ("rouge_l", "chrf"):
    metric = metrics.METRICS[name]
    clock(f"{name}, 20,000 pairs", lambda m=metric: metrics.compute(m, pairs))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(f"peak memory {peak:.0f} MiB, of which the losses {losses.nbytes / 2**20:.0f} MiB")


if __name__ == "__main__":
  main()
