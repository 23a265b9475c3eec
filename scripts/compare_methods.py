r"""Calibration methods side by side on cached generations, as a Markdown table.

  calm generate --prompts=test.jsonl.gz --measure=classifier --output=runs/cache
  python scripts/compare_methods.py runs/cache --tolerances 0.02 0.05 0.1 0.25

For each tolerance and method: the threshold certified on all prompts and its layers a token;
mean and standard deviation over random 80/20 splits (by source) of test risk and layers; and
the share of violations among calibration sets drawn with replacement from the pool, whose mean
is then the true risk, with its 95 % interval. Needs numpy and scipy only.
"""

import argparse

import numpy as np
import tables

from calm.calibrate import calibrate, generations, thresholds, trials
from calm.calibrate import losses as sequence_losses

HEADER = (
  "tolerance",
  "method",
  "threshold",
  "layers",
  "split risk",
  "split layers",
  "violations",
)


def chosen(losses, layers: trials.LayerCounts, tolerance, error_rate, method, groups):
  """The threshold that all prompts certify, and its mean layers a token."""
  made = calibrate(
    losses, tolerance=tolerance, error_rate=error_rate, method=method, groups=groups
  )
  column = np.flatnonzero(losses.thresholds == made.threshold)
  if not column.size:
    return made.threshold, float(layers.full_depth)
  return made.threshold, layers.layers[:, column].sum() / layers.tokens[:, column].sum()


def table_rows(losses, layers, arguments, groups):
  """One row a (tolerance, method)."""
  results = []
  for method in arguments.methods:
    common = dict(error_rate=arguments.error_rate, method=method, groups=groups)
    splits = trials.split_trials(
      losses, arguments.tolerances, layers=layers, trials=arguments.splits, **common
    )
    validity = trials.validity_trials(
      losses, arguments.tolerances, trials=arguments.draws, **common
    )
    for split, valid in zip(splits, validity, strict=True):
      threshold, depth = chosen(losses, layers, split.tolerance, **common)
      low, high = (100 * bound for bound in valid.interval)
      results.append(
        (
          f"{split.tolerance:g}",
          method,
          thresholds.format_threshold(threshold),
          f"{depth:.2f}",
          f"{split.risk_mean:.4f} ± {split.risk_spread:.4f}",
          f"{split.layers_mean:.2f} ± {split.layers_spread:.2f}",
          f"{100 * valid.share:.1f} % ({low:.1f} to {high:.1f})",
        )
      )
  return sorted(results, key=lambda row: float(row[0]))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("directory", help="folder of `calm generate`")
  parser.add_argument("--tolerances", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.25])
  parser.add_argument("--methods", nargs="+", default=["paper", "auto"])
  parser.add_argument("--error_rate", type=float, default=0.05)
  parser.add_argument("--kind", default="textual", help="textual, risk_signed, risk_clipped")
  parser.add_argument("--metric", default="rouge_l")
  parser.add_argument("--splits", type=int, default=50)
  parser.add_argument("--draws", type=int, default=500)
  parser.add_argument("--output", help="JSON file of the table, for scripts/tables.py")
  arguments = parser.parse_args()
  cached = generations.load(arguments.directory)
  losses = sequence_losses.compute(cached, arguments.kind, metric=arguments.metric)
  counts = cached.layer_counts()
  if counts is None:
    parser.error(
      "expected every record to have its `exit_layers`, and no run that stopped early"
    )
  layers = trials.LayerCounts(*counts, max(max(r.exit_layers or (0,)) for r in cached.full))
  groups = cached.groups
  units = len(set(groups or cached.ids))
  print(f"{len(cached.ids)} prompts, {units} units, {arguments.kind} {arguments.metric}\n")
  print("| " + " | ".join(HEADER) + " |")
  print("|" + " --- |" * len(HEADER))
  rows = table_rows(losses, layers, arguments, groups)
  for row in rows:
    print("| " + " | ".join(row) + " |")
  if arguments.output:
    align = ["left"] * len(HEADER)
    tables.write(arguments.output, HEADER, rows, align=align)


if __name__ == "__main__":
  main()
