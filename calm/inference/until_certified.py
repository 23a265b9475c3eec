"""Generation that stops as soon as calibration can decide (`calm generate --until-certified`).

Thresholds are taken from the safest down, prompts in an order fixed by their ids and the
procedure; the first threshold that can no longer be certified ends the run. Prompts are encoded
once for all thresholds, as far as memory goes, and what a lower threshold cannot change is not
decoded again.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from calm import exits
from calm.calibrate import Calibration, Prompt, Record, sequential
from calm.calibrate.generations import order, reuse
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.losses import asking
from calm.data import prompt_batches as prompts_lib
from calm.exits import schedules
from calm.inference import grid
from calm.inference import predictor as predictor_lib
from calm.t5 import caches

# (threshold, units decided on at it, planned units)
Progress = Callable[[float, int, int], None]

# Encoded prompts are kept for lower thresholds up to so many bytes; others are encoded again.
KEPT_BYTES = 2**30


def in_order(
  predictor: predictor_lib.Predictor, prompts: Sequence[Prompt], *, ungrouped: bool = False
) -> list[Prompt]:
  """The prompts in the order in which the test sees them.

  Args:
    predictor: the model; its procedure is part of the order's seed.
    prompts: [num_prompts] prompts.
    ungrouped: whether prompts are the units of the test where they come in clusters
      (`order.known_groups`); else the prompts of a cluster stand together.
  """
  ids = [prompt.id for prompt in prompts]
  groups = None if ungrouped else order.known_groups(prompts)
  contents = order.prompts_digest(prompts)
  rows = order.decoding_order(ids, groups, predictor.procedure, contents)
  return [prompts[row] for row in rows]


def generate(
  predictor: predictor_lib.Predictor,
  prompts: Sequence[Prompt],
  writer: writer_lib.Writer,
  test: sequential.SequentialCalibration,
  *,
  kind: str,
  metric: str,
  ask: asking.Ask | None = None,
  progress: Progress | None = None,
  kept_bytes: int = KEPT_BYTES,
) -> Calibration:
  """Decodes what the test asks for, into `writer`, until it has decided.

  Args:
    predictor: the model.
    prompts: from `in_order`; `ungrouped` unless `test.clusters`.
    writer: opened with these prompts, the test's thresholds, `sequential=True` and
      `by_group=test.clusters`.
    test: decides what is decoded next; planned for all prompts, or for all clusters.
    kind: 'textual', 'risk_signed' or 'risk_clipped'.
    metric: name or import path of the text metric.
    ask: who knows references that a risk needs, of prompts that have none; it is asked batch by
      batch, where texts differ.
    progress: told after every batch.
    kept_bytes: memory for encoded prompts; those beyond it are encoded again at every
      threshold.

  Returns:
    The calibration; its p-values and bounds hold although the run stopped when it pleased.

  Raises:
    asking.Unanswered: references are missing; what was decoded is kept, and the same call goes
      on there.
  """
  groups = order.prompt_clusters(prompts) if test.clusters else None
  units = order.consecutive_units(len(prompts), groups)
  grid.check_reference(predictor)
  decoder = _Decoder(predictor, prompts, writer, kept_bytes)
  reference = decoder
  if predictor.reference is not predictor:
    reference = _Decoder(predictor.reference, prompts, writer, 0, exits.StaticExit())
  # As many units as fill a batch; the same ones at every threshold.
  batch_size = max(1, predictor.options.batch_size * len(units) // len(prompts))
  while (request := test.request(batch_size)) is not None:
    wanted = units[request.start : request.stop]
    rows = slice(wanted[0].start, wanted[-1].stop)
    full = reference.records(rows, schedules.NEVER_EXIT)
    early = decoder.records(rows, request.threshold)
    losses = asking.batch_losses(
      prompts[rows], request.threshold, early, full, kind=kind, metric=metric, ask=ask
    )
    test.add(order.unit_means(losses, wanted))
    if progress is not None:
      progress(request.threshold, request.stop, len(units))
  names = order.unit_names([prompt.id for prompt in prompts], groups)
  return test.calibration(
    kind=kind,
    metric=metric,
    seed=order.order_seed(names, predictor.procedure, order.prompts_digest(prompts)),
    procedure=predictor.procedure,
    groups_ignored=groups is None and order.known_groups(prompts) is not None,
  )


class _Decoder:
  """Records of prompts at thresholds, each from the cheapest source there is.

  That is the writer (a run that goes on), the record at the threshold before where no token
  would now leave earlier, or the model.
  """

  def __init__(self, predictor, prompts: Sequence[Prompt], writer, kept_bytes: int, rule=None):
    self._predictor, self._prompts, self._writer = predictor, prompts, writer
    self._rule: exits.Rule | None = rule
    self._room = kept_bytes
    self._done: dict[float, dict[str, Record]] = {}
    self._encoded: dict[int, list[tuple[prompts_lib.PromptBatch, caches.Encoded]]] = {}

  def records(self, rows: slice, threshold: float) -> list[Record]:
    """The records of some prompts at one threshold; they are in the writer then."""
    if threshold not in self._done:
      self._done[threshold] = self._writer.completed_records(threshold)
    done = self._done[threshold]
    ids = [prompt.id for prompt in self._prompts[rows]]
    missing = [name for name in ids if name not in done]
    made = self._unchanged(missing, threshold)
    made.update(self._decode(rows, {*missing} - {*made}, threshold))
    self._writer.append(threshold, [made[name] for name in missing])
    done.update(made)
    return [done[name] for name in ids]

  def _unchanged(self, names: Sequence[str], threshold: float) -> dict[str, Record]:
    """Records of higher thresholds that are the same at this one."""
    values = grid.schedule_values(self._predictor, threshold)
    # The last threshold before this one says most: it has the fewest refusals.
    before: dict[str, Record] = {}
    for level in sorted((level for level in self._done if level > threshold), reverse=True):
      before.update({n: self._done[level][n] for n in names if n in self._done[level]})
    return {
      name: record for name, record in before.items() if reuse.is_reusable(record, values)
    }

  def _decode(self, rows: slice, names: set[str], threshold: float) -> dict[str, Record]:
    made = {}
    for batch, encoded in self._batches(rows) if names else ():
      ids = [self._prompts[rows.start + row].id for row in batch.rows]
      active = batch.active.copy()
      active[: len(ids)] = [name in names for name in ids]
      if active.any():
        generation = self._predictor.decode(encoded, active, threshold, self._rule)
        for i in np.flatnonzero(active).tolist():
          made[ids[i]] = grid.record(self._predictor, generation, i, ids[i])
    return made

  def _batches(self, rows: slice) -> list[tuple[prompts_lib.PromptBatch, caches.Encoded]]:
    """The prompts encoded, and kept while there is room."""
    if rows.start in self._encoded:
      return self._encoded[rows.start]
    planned = self._predictor.plan([prompt.input for prompt in self._prompts[rows]])
    batches = [(batch, self._predictor.encode(batch)) for batch in planned]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves([encoded for _, encoded in batches]))
    if size <= self._room:
      self._room -= size
      self._encoded[rows.start] = batches
    return batches
