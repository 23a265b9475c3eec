"""What a predictor remembers of drafts, text after text: what they were worth.

No text depends on it; how many drafts are made, and so the seconds, do.
"""

import dataclasses
from typing import Any

import numpy as np

from calm import exits
from calm.decode import drafting, loop, verified_passes

# What a batch's savings still weigh after the next one.
MEMORY = 0.8
# A batch must save more than this much of its steps: passes take a little more than is told.
MARGIN = 0.04
# What the last batches may have lost, where enough drafts of the last one were accepted.
LEAST_SAVED = -2.0
# Most batches at full depth between two that draft.
MOST_WAITS = 64


@dataclasses.dataclass
class Expected:
  """What drafts were worth so far, under one rule and threshold.

  Attributes:
    must: whether they are made whatever they are worth.
    prior: what the next text begins with.
    saved: steps of the full model that drafts of the last batches saved, as far as
      `drafting.Plan` knows; an older batch weighs `MEMORY`.
    idle: batches in turn after which they had saved none.
    waits: batches that make no draft before the next one that does.
    plans: by number of rows, what passes of a batch cost.
    last: a batch and its rows with prompts, if there is still something to learn of it: its
      text is given back first.
  """

  must: bool
  prior: drafting.Prior = drafting.UNKNOWN
  saved: float = 0.0
  idle: int = 0
  waits: int = 0
  plans: dict[int, drafting.Plan] = dataclasses.field(default_factory=dict)
  last: tuple[loop.Generation, np.ndarray] | None = None

  def learn(self) -> None:
    """Learns of the batch before, where that is still to be done."""
    if self.last is not None:
      last, self.last = self.last, None
      self.saw(*last)

  def drafts(self, rows: int) -> bool:
    """Whether the next batch, of so many rows, makes any; one that waits is counted."""
    hopes = self.must or self.plans[rows].hopes
    if self.waits == 0 or not hopes:
      return hopes
    self.waits -= 1
    return False

  def saw(self, made: loop.Generation, active: np.ndarray) -> None:
    """Learns of a batch that made drafts; `made` is fetched, `active` [batch] has prompts."""
    seen = made.verification
    assert seen is not None
    # Python's own numbers: NumPy's sums and choices between two texts took a tenth of a
    # millisecond, which is a third of a token.
    expected = seen.expected.tolist()
    known = [
      row[:2] for row, has_prompt in zip(expected, active.tolist(), strict=True) if has_prompt
    ]
    if known:
      self.prior = drafting.learned(self.prior, *zip(*known, strict=True))
    # A batch takes as many steps as its longest row has tokens.
    tokens = max(map(np.count_nonzero, made.exit_layers))
    saved = (1.0 - MARGIN) * tokens - max(row[2] for row in expected)
    self.saved = MEMORY * self.saved + saved
    plan = self.plans.get(len(active))
    accepted = sum(row[0] for row in known) / max(len(known), 1)
    promising = plan is not None and accepted >= plan.least_share
    self.idle = 0 if self.saved > (LEAST_SAVED if promising else 0.0) else self.idle + 1
    self.saved = max(self.saved, LEAST_SAVED)
    # 1, 4, 16 ...: a text that drafts for nothing runs a program that others leave cold.
    self.waits = 0 if self.must else min(4**self.idle // 4, MOST_WAITS)


def plan(model: Any, rule: exits.Verified, rows: int) -> drafting.Plan:
  """What passes of a batch of so many rows cost."""
  each = -(-rows // model.options.num_devices)
  weights, native = model.weights.decoder, model.program(rule).native
  return verified_passes.plan(model.config, weights, rule, each, native)


def without_drafts(full: loop.Generation) -> loop.Generation:
  """A generation of full depth, told as `exits.Verified` tells one that made no draft; of what
  drafts are worth it says nothing. A call of NumPy between two texts costs microseconds."""
  emitted = np.asarray(full.exit_layers) > 0
  counts = np.zeros((len(emitted), 2), np.int32)
  np.add.reduce(emitted, axis=-1, out=counts[:, 0])
  verification = loop.Verification(
    drafted=np.zeros(emitted.shape, bool),
    counts=counts,
    expected=np.zeros((len(emitted), 3), np.float32),
  )
  return loop.Generation(
    tokens=full.tokens,
    exit_layers=full.exit_layers,
    confidences=emitted.astype(np.float32),
    rejected_confidences=full.rejected_confidences,
    scores=full.scores,
    verification=verification,
  )
