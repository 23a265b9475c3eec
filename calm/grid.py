"""Prompts x thresholds -> cached generations: one encoding a prompt, one compilation a grid.

The first pass never exits but measures; a sequence whose refused confidences all stay below
the next threshold is the same there and is not decoded again (`calibrate.reuse`).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from calm import inference, schedules, step
from calm import prompts as prompts_lib
from calm.calibrate import Prompt, Record, generation_writer, reuse

# (threshold just finished, batch number, number of batches)
Progress = Callable[[float, int, int], None]


def generate(
  predictor: inference.Predictor,
  prompts: Sequence[Prompt],
  thresholds: Sequence[float],
  writer: generation_writer.Writer,
  *,
  reuse_records: bool = True,
  progress: Progress | None = None,
) -> reuse.ReuseSummary:
  """Decodes every prompt at full depth and at every threshold into `writer`.

  What the writer already has is not decoded again, so that a killed run goes on.

  Args:
    predictor: the model.
    prompts: the prompts; their ids name the records.
    thresholds: strictly descending, without `NEVER_EXIT`.
    writer: from `generation_writer.open_writer` with the same prompts and thresholds.
    reuse_records: take over sequences that a lower threshold cannot change.
    progress: told after every batch and threshold.

  Returns:
    How much of the grid was not decoded again.
  """
  levels = [schedules.NEVER_EXIT, *thresholds]
  batches = predictor.plan([prompt.input for prompt in prompts])
  summary = reuse.ReuseSummary()
  for number, batch in enumerate(batches):
    ids = [prompts[row].id for row in batch.rows]
    encoded, previous = None, dict[str, Record]()
    for threshold in levels:
      done = writer.completed_records(threshold)
      records = {i: done[i] for i in ids if i in done}
      missing = [i for i in ids if i not in records]
      if missing:
        if encoded is None:
          encoded = predictor.encode(batch)
        sources = previous if reuse_records else {}
        made, reused = _decode(predictor, encoded, batch, ids, missing, threshold, sources)
        writer.append(threshold, made)
        records.update({record.id: record for record in made})
        if threshold != schedules.NEVER_EXIT:
          summary += reused
      previous = records
      if progress is not None:
        progress(threshold, number, len(batches))
  return summary


def _decode(
  predictor: inference.Predictor,
  encoded: step.Encoded,
  batch: prompts_lib.PromptBatch,
  ids: Sequence[str],
  missing: Sequence[str],
  threshold: float,
  previous: dict[str, Record],
) -> tuple[list[Record], reuse.ReuseSummary]:
  """The missing records of one batch at one threshold, and what was taken over."""
  values = schedule_values(predictor, threshold)
  kept = [i for i in missing if i in previous and reuse.is_reusable(previous[i], values)]
  fresh = set(missing) - set(kept)
  active = batch.active & np.isin(np.arange(len(batch.active)), [ids.index(i) for i in fresh])
  made = {i: previous[i] for i in kept}
  if fresh:
    generation = predictor.decode(encoded, active, threshold)
    made.update({i: record(predictor, generation, ids.index(i), i) for i in fresh})
  records = [made[i] for i in missing]
  lengths = [len(r.tokens or ()) for r in records]
  reused = [len(r.tokens or ()) if r.id in kept else 0 for r in records]
  return records, reuse.summarize(reused, lengths)


def schedule_values(predictor: inference.Predictor, threshold: float) -> np.ndarray:
  """The schedule's threshold at every token, in float32 as the decoder has it."""
  positions = jnp.arange(predictor.options.max_decode_length)
  values = predictor.options.schedule(jnp.asarray(threshold, jnp.float32), positions)
  return np.broadcast_to(np.asarray(values), positions.shape)


def record(predictor: inference.Predictor, generation, row: int, prompt_id: str) -> Record:
  """One row of a generation as a record on disk."""
  output = predictor.output(generation, row)
  return Record(
    id=prompt_id,
    prediction=output.text,
    tokens=output.tokens,
    exit_layers=output.exit_layers,
    confidences=output.confidences,
    rejected_confidences=output.rejected_confidences,
    score=output.score,
  )
