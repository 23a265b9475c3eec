"""How fast calibration is: 10,000 prompts x 100 thresholds, trials, and ROUGE-L on all cores.

python scripts/benchmark_calibrate.py
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from calm.calibrate import SequenceLosses, calibrate, trials
from calm.calibrate.evidence import betting, bounds, p_values
from calm.calibrate.losses import metric_values, metrics

PROMPTS, THRESHOLDS = 10_000, 100
RATES = {"tolerance": 0.1, "error_rate": 0.05}


def clock(name: str, target: float | None, work: Callable[[], Any]) -> None:
  """Prints the seconds of one piece of work beside its target."""
  started, used = time.perf_counter(), time.process_time()
  work()
  seconds, used = time.perf_counter() - started, time.process_time() - used
  aim = "" if target is None else f"  target {target:g}"
  print(f"{name:<58} {seconds:8.3f} s, {used:7.3f} s of CPU{aim}", flush=True)


def texts(generator: np.random.Generator, rows: int, words: int = 12) -> list[str]:
  """Random texts of about that many words."""
  return [" ".join(f"w{k}" for k in row) for row in generator.integers(0, 400, (rows, words))]


def clock_thresholds(losses: np.ndarray, grid: np.ndarray) -> None:
  """P-values, upper bounds and whole calibrations of one table of losses."""
  binary, sums = np.round(losses), losses.sum(axis=0)
  for p_value in (p_values.hoeffding, p_values.hoeffding_bentkus, p_values.convex_order):
    clock(f"p-values, {p_value.__name__}", 1.0, lambda f=p_value: f(sums, PROMPTS, 0.1))
    clock(
      f"upper bounds, {p_value.__name__}",
      None,
      lambda f=p_value: bounds.invert(f, sums, PROMPTS, error_rate=0.05),
    )
  clock("p-values, binomial", 1.0, lambda: p_values.binomial(binary.sum(axis=0), PROMPTS, 0.1))
  clock("p-values, betting", 1.0, lambda: p_values.betting(losses, 0.1))
  clock("upper bounds, betting", None, lambda: bounds.betting(losses, error_rate=0.05))
  fixed = betting.FIXED_LEVEL
  clock(
    "p-values, betting_fixed_level", 1.0, lambda: p_values.betting(losses, 0.1, strategy=fixed)
  )
  for method in ("auto", "paper", "convex_order"):
    clock(
      f"calibrate, method {method}",
      2.0,
      lambda m=method: calibrate(losses, grid, tolerance=0.1, error_rate=0.05, method=m),
    )


def clock_trials(pool: SequenceLosses) -> None:
  """What the paper's Figures of promises repeat many times."""
  tolerances = np.linspace(0.01, 0.3, 20).tolist()

  def three_measures(method: str) -> None:
    for _ in range(3):
      trials.split_trials(pool, tolerances, error_rate=0.05, method=method)
      trials.validity_trials(pool, tolerances, error_rate=0.05, method=method)

  for method in ("auto", "paper", "convex_order"):
    name = f"trials (a) and (b), {method}: 3 measures x 20 tolerances"
    clock(name, 30.0, lambda m=method: three_measures(m))


def clock_metrics(generator: np.random.Generator, rows: int = 40_000) -> None:
  """Text metrics: in one process, in several, and where texts repeat."""
  early, full = texts(generator, rows), texts(generator, rows)
  pairs = [(text, (other,)) for text, other in zip(early, full, strict=True)]
  for name in ("rouge_l", "chrf"):
    metric = metrics.METRICS[name]
    clock(
      f"{name}, 2,000 prompts x 20 thresholds, one process",
      None,
      lambda m=metric: metric_values.compute(m, pairs, workers=1),
    )
    clock(
      f"{name}, the same, processes where they pay",
      None,
      lambda m=metric: metric_values.compute(m, pairs),
    )
  repeated = pairs[:2000] * 20
  clock(
    "rouge_l, outputs repeated at all 20 thresholds",
    None,
    lambda: metric_values.compute(metrics.METRICS["rouge_l"], repeated, workers=1),
  )


def main() -> None:
  """Runs every measurement."""
  generator = np.random.default_rng(0)
  shape = (PROMPTS, THRESHOLDS)
  losses = (generator.random(shape) < np.linspace(0.0, 0.3, THRESHOLDS)) * generator.random(
    shape
  )
  grid = np.linspace(0.99, 0.0, THRESHOLDS)
  print(f"{PROMPTS} prompts x {THRESHOLDS} thresholds")
  clock_thresholds(losses, grid)
  clock_trials(SequenceLosses(losses[:2000, ::5], grid[::5]))
  clock_metrics(generator)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(
    f"peak memory {peak:.0f} MiB, of which one table of losses {losses.nbytes / 2**20:.0f} MiB"
  )


if __name__ == "__main__":
  main()
