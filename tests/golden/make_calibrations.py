"""Writes one calibration of every kind; `calibrations/` holds those of commit
d1de7c0.

`python -m tests.golden.make_calibrations FOLDER`. Kinds in `RETIRED` used
methods that are gone: their files are read, and cannot be made again.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np

from calm import calibrate
from calm.calibrate import SequenceLosses, Support, risks
from tests.calibrate import laws

GRID = (0.9, 0.6, 0.3, 0.1)
# as they were made
RATES = {"tolerance": 0.1, "error_rate": 0.05, "randomized": False}
SHARES = np.array([0.0, 0.03, 0.07, 0.9])
RETIRED = (
  *("method_hoeffding", "method_hoeffding_bentkus", "method_betting_early"),
  *(
    "configurations",
    "configurations_of_clusters",
    "given_order",
    "testing_bonferroni",
  ),
  *("sequential", "sequential_of_clusters"),
)


def table(seed=0, shares=SHARES, size=160, **fields) -> SequenceLosses:
  """Losses in [0, 1], zero for most prompts; later thresholds lose more."""
  generator = np.random.default_rng(seed)
  values = (generator.random((size, 1)) < shares) * generator.beta(
    2.0, 4.0, (size, len(shares))
  )
  ids = tuple(f"prompt {row}" for row in range(size))
  return SequenceLosses(
    values, GRID, **{"metric": "rouge_l", "ids": ids, **fields}
  )


def binary(seed=0, **fields) -> SequenceLosses:
  values = np.asarray(table(seed).values > 0.0, np.float64)
  return SequenceLosses(
    values, GRID, Support(binary=True), metric="exact_match", **fields
  )


def signed(seed=0, **fields) -> SequenceLosses:
  values = table(seed).values - 0.5 * table(seed + 1, np.full(4, 0.05)).values
  return SequenceLosses(
    values,
    GRID,
    Support(lower=-1.0),
    kind="risk_signed",
    metric="token_f1",
    **fields,
  )


def certify(losses, thresholds=None, **options):
  return calibrate.calibrate(losses, thresholds, **{**RATES, **options})


def clusters(seed=0, **fields) -> SequenceLosses:
  return table(
    seed, groups=tuple(f"text {row // 2}" for row in range(160)), **fields
  )


def noted():
  made = certify(table(procedure=laws.procedure()))
  pair = dict(
    batch_size=1,
    num_prompts=12,
    full=8.0,
    early=4.0,
    speedup=2.0,
    end_to_end=1.5,
  )
  provenance = dataclasses.replace(
    made.provenance, notes={"seconds": dict(single=pair, batched=pair)}
  )
  return dataclasses.replace(made, provenance=provenance)


LABELS = [f"task {row % 2}" for row in range(160)]
KINDS = {
  "mean": lambda: certify(table()),
  "mean_with_procedure": lambda: certify(
    table(
      procedure=laws.procedure(
        reference_dtype="float32", reference_digest="r" * 64
      )
    )
  ),
  "mean_with_notes": noted,
  "randomized": lambda: certify(table(), randomized=True),
  "plain_losses": lambda: certify(table().values.tolist(), GRID),
  "plain_binary": lambda: certify(binary().values, GRID),
  "plain_of_few_kinds": lambda: certify(
    np.round(table().values * 2.0) / 2.0, GRID
  ),
  "own_seed": lambda: certify(table(), seed="abc123"),
  "clusters": lambda: certify(clusters()),
  "clusters_ignored": lambda: certify(clusters().ungrouped()),
  "signed": lambda: certify(signed()),
  "signed_paper": lambda: certify(signed(), method="paper"),
  "clipped_paper": lambda: certify(
    table(kind="risk_clipped", metric="token_f1"), method="paper"
  ),
  "knobs": lambda: certify(
    calibrate.from_texts(
      [f"answer {row}" for row in range(100)],
      {
        "base": [f"answer {row}" if row % 50 else "x" for row in range(100)],
        "tiny": [f"answer {row}" if row % 3 else "x" for row in range(100)],
      },
      metric="exact_match",
    )
  ),
  "nothing_certified": lambda: certify(table(shares=np.full(4, 0.9))),
  "too_few_prompts": lambda: certify(table(size=10)),
  "lost_value": lambda: certify(
    np.where(table().values > 0.68, np.nan, table().values), GRID
  ),
  "quantile": lambda: certify(
    table(), tolerance=0.3, promise=risks.Quantile(0.9)
  ),
  "every_group": lambda: certify(
    table(), promise=risks.EveryGroup(labels=LABELS)
  ),
  "each_group": lambda: calibrate.each_group(table(), LABELS, **RATES)[
    "task 1"
  ],
  "early_exits": lambda: certify(
    table(),
    promise=risks.EarlyExits(
      (2.0, 4.0), depths=np.arange(640).reshape(160, 4) % 5 % 4 + 1
    ),
  ),
  "tail_mean": lambda: certify(
    table(), tolerance=0.5, promise=risks.TailMean(0.8, 0.1)
  ),
  "known_mixture": lambda: certify(
    table(), promise=risks.KnownMixture(1.5, weights=[0.5, 1.5] * 80)
  ),
  "several_risks": lambda: calibrate.calibrate(
    risks=[risks.Risk(table(), 0.1, "rouge"), risks.Risk(table(1), 0.2, "f1")],
    error_rate=0.05,
    randomized=False,
  ),
  "cost": lambda: certify(
    table(),
    promise=risks.Cost(0.8, costs=np.tile([0.9, 0.6, 0.4, 0.2], (160, 1))),
  ),
  **{
    f"method_{name}": lambda name=name: certify(table(), method=name)
    for name in ("paper", "convex_order", "betting", "betting_fixed_level")
  },
  "method_binomial": lambda: certify(binary(), method="binomial"),
  **{
    f"testing_{name}": lambda name=name: certify(
      table(), testing_procedure=name
    )
    for name in ("fallback", "holm")
  },
}


def main(folder: pathlib.Path) -> None:
  with open(folder / "every_kind.jsonl", "w", encoding="utf-8") as file:
    for name, build in KINDS.items():
      found = build()
      line = {"name": name, "calibration": found.to_json()}
      line["certified"] = [row.threshold for row in found.rows if row.rejected]
      file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
