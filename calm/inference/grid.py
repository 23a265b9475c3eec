"""Prompts x thresholds -> cached generations: one encoding a prompt, one compilation a grid.

The first pass never exits but measures; a sequence whose refused confidences all stay below
the next threshold is the same there and is not decoded again, any other from the first token
on where they do not (`calibrate.reuse`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.calibrate import Prompt, Record
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import reuse
from calm.calibrate.generations import writer as writer_lib
from calm.data import prompt_batches as prompts_lib
from calm.decode import loop
from calm.exits import schedules
from calm.t5 import caches

if TYPE_CHECKING:  # the predictor itself decodes grids
  from calm.inference import predictor as predictor_lib

# (threshold just finished, batch number, number of batches)
Progress = Callable[[float, int, int], None]


def as_shares(report: Callable[[float, str], None], thresholds: Sequence[float]) -> Progress:
  """Progress that reports the share of a grid that is done, in [0, 1], and what is done."""
  count = len(thresholds) + 1

  def advance(threshold: float, number: int, batches: int) -> None:
    done = 0 if threshold == schedules.NEVER_EXIT else thresholds.index(threshold) + 1
    share = (number * count + done + 1) / (batches * count)
    shown = thresholds_lib.format_threshold(threshold)
    report(share, f"batch {number + 1} of {batches}, threshold {shown}")

  return advance


def generate(
  predictor: "predictor_lib.Predictor",
  prompts: Sequence[Prompt],
  thresholds: Sequence[float],
  writer: writer_lib.Writer,
  *,
  reuse_records: bool = True,
  full: Sequence[Record] | None = None,
  encodings: dict[int, caches.Encoded] | None = None,
  progress: Progress | None = None,
) -> reuse.ReuseSummary:
  """Decodes every prompt at full depth and at every threshold into `writer`.

  What the writer already has is not decoded again, so that a killed run goes on.

  Args:
    predictor: the model.
    prompts: the prompts; their ids name the records.
    thresholds: strictly descending, without `NEVER_EXIT`.
    writer: from `writer.open_writer` with the same prompts and thresholds.
    reuse_records: take over what a lower threshold cannot change: sequences, and beginnings.
    full: [num_prompts] records of the full-depth program (of `predictor.reference`), where
      there are some: they are written as they are, and nothing is taken over from them.
    encodings: what was encoded by batch number, to be read and filled where several grids are
      decoded for the same prompts in the same batches by the same encoder. What a reference of
      its own encodes is not among it: give its records as `full` to decode them once.
    progress: told after every batch and threshold.

  Returns:
    How much of the grid was not decoded again.
  """
  if full is None:
    check_reference(predictor)
  levels = [schedules.NEVER_EXIT, *thresholds]
  given = {} if full is None else {record.id: record for record in full}
  batches = predictor.plan([prompt.input for prompt in prompts])
  apart = bool(given) or predictor.reference is not predictor
  summary = reuse.ReuseSummary()
  for number, batch in enumerate(batches):
    ids = [prompts[row].id for row in batch.rows]
    work, previous = _Batch(predictor, batch, ids, reuse_records), dict[str, Record]()
    work.encoded = None if encodings is None else encodings.get(number)
    for threshold in levels:
      records = writer.completed_records(threshold, ids)
      missing = [i for i in ids if i not in records]
      if missing and given and threshold == schedules.NEVER_EXIT:
        writer.append(threshold, [given[i] for i in missing])
      elif missing and apart and threshold == schedules.NEVER_EXIT:
        writer.append(threshold, _full_depth(predictor.reference, batch, ids, missing))
      elif missing:
        made, reused = work.decode(missing, threshold, previous if reuse_records else {})
        writer.append(threshold, made)
        records.update({record.id: record for record in made})
        if threshold != schedules.NEVER_EXIT:
          summary += reused
      # The full-depth program refused nothing: it says nothing of what would have left.
      previous = {} if apart and threshold == schedules.NEVER_EXIT else records
      if progress is not None:
        progress(threshold, number, len(batches))
    if encodings is not None and work.encoded is not None:
      encodings[number] = work.encoded
  return summary


def check_reference(predictor: "predictor_lib.Predictor") -> None:
  """Refuses a model whose reference texts another model writes, which is not here.

  Raises:
    ValueError: `reference_digest` is set.
  """
  if predictor.options.reference_digest is not None:
    raise ValueError(
      "Expected the full-depth texts of the model that was given, with which this promise"
      f" compares, got none (parameters {predictor.options.reference_digest[:12]}); set"
      " `reference_digest` None for a promise about this model's own full depth."
    )


def _full_depth(
  reference: "predictor_lib.Predictor",
  batch: prompts_lib.PromptBatch,
  ids: Sequence[str],
  missing: Sequence[str],
) -> list[Record]:
  """Records of the full-depth program of another model, which encodes the prompts itself."""
  active = np.zeros(len(batch.active), bool)
  active[[ids.index(i) for i in missing]] = True
  encoded = reference.encode(batch)
  made = reference.decode(encoded, active, schedules.NEVER_EXIT, exits.StaticExit())
  return [record(reference, made, ids.index(i), i) for i in missing]


class _Batch:
  """Prompts that are decoded together, threshold after threshold.

  What was decoded stays on the device with its caches: at a lower threshold a sequence is the
  same up to the first token that would now leave earlier, and decoding goes on there.
  """

  def __init__(
    self,
    predictor: "predictor_lib.Predictor",
    batch: prompts_lib.PromptBatch,
    ids: Sequence[str],
    resumes: bool,
  ):
    self._predictor, self._batch, self._ids = predictor, batch, ids
    self._resumes = resumes
    self.encoded: caches.Encoded | None = None
    self._state: loop.DecodingState | None = None

  def decode(
    self, missing: Sequence[str], threshold: float, previous: dict[str, Record]
  ) -> tuple[list[Record], reuse.ReuseSummary]:
    """The missing records at one threshold, and what was taken over."""
    values = schedule_values(self._predictor, threshold)
    kept = [i for i in missing if i in previous and reuse.is_reusable(previous[i], values)]
    fresh = [i for i in missing if i not in kept]
    made = {i: previous[i] for i in kept}
    begins: dict[str, int] = {}
    if fresh:
      generation, begins = self._run(fresh, threshold, values)
      made.update({i: self._record(generation, i) for i in fresh})
    records = [made[i] for i in missing]
    lengths = [len(r.tokens or ()) for r in records]
    reused = [len(r.tokens or ()) if r.id in kept else begins.get(r.id, 0) for r in records]
    return records, reuse.summarize(reused, lengths)

  def _run(
    self, fresh: Sequence[str], threshold: float, values: np.ndarray
  ) -> tuple[loop.Generation, dict[str, int]]:
    """The rows' generation, and how many of its tokens were not decoded again."""
    if self.encoded is None:
      self.encoded = self._predictor.encode(self._batch)
    active = np.zeros(len(self._batch.active), bool)
    active[[self._ids.index(i) for i in fresh]] = True
    options = self._predictor.options
    # Each device would need its own loop's state; passes keep none.
    if options.num_devices > 1 or isinstance(options.rule, exits.Verified):
      return self._predictor.decode(self.encoded, active, threshold), {}
    resume_at = np.zeros(len(active), np.int32)
    if self._state is not None and self._resumes:
      before = jax.device_get(self._state.generation)
      for i in fresh:
        record = self._record(before, i)
        same = reuse.reusable_tokens(record, values)
        # The last token is decoded again whatever the records say: there is a row to run.
        resume_at[self._ids.index(i)] = max(0, min(same, len(record.tokens or ()) - 1))
    self._state = self._predictor.resume(
      self.encoded, self._state, active, threshold, resume_at
    )
    begins = {i: int(resume_at[self._ids.index(i)]) for i in fresh}
    return jax.device_get(self._state.generation), begins

  def _record(self, generation: loop.Generation, prompt_id: str) -> Record:
    return record(self._predictor, generation, self._ids.index(prompt_id), prompt_id)


def schedule_values(predictor: "predictor_lib.Predictor", threshold: float) -> np.ndarray:
  """The schedule's threshold at every token, in float32 as the decoder has it."""
  positions = jnp.arange(predictor.options.max_decode_length)
  values = predictor.options.schedule(jnp.asarray(threshold, jnp.float32), positions)
  return np.broadcast_to(np.asarray(values), positions.shape)


def record(
  predictor: "predictor_lib.Predictor", generation, row: int, prompt_id: str
) -> Record:
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
