"""Prompts x thresholds -> records: whole grids and single rules.

Prompts are encoded once for all thresholds. A sequence whose refused confidences all stay below
the next threshold is the same there and is not decoded again, any other from the first token
on where they do not (`reusable_tokens`).
"""

import collections
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from calm import exits
from calm.calibrate import NEVER_EXIT, Prompt, Record, generations
from calm.calibrate import thresholds as thresholds_lib
from calm.decode import loop
from calm.inference import options as options_lib
from calm.inference import result_cache
from calm.t5 import caches

if TYPE_CHECKING:
  from calm.inference.predictor import Predictor

# (share done in [0, 1], what is being done)
Progress = Callable[[float, str], None]


def silent(share: float, text: str) -> None:
  """A `Progress` that shows nothing."""
  del share, text


class _Batch:
  """Prompts that are decoded together, threshold after threshold.

  Where rows are steps of one loop, caches stay on the device: at a lower threshold a sequence
  is the same up to the first token that would now leave earlier, and decoding goes on there.
  """

  def __init__(self, model: "Predictor", batch, ids: Sequence[str]):
    self._model, self._batch, self._ids = model, batch, ids
    # Each device would need its own loop's state; passes over drafts keep none.
    self._resumes = model.options.num_devices == 1 and not model.options.rule.speculates
    self._state: loop.DecodingState | None = None
    self.encoded: caches.Encoded | None = None

  def decode(
    self, missing: Sequence[str], threshold: float, previous: Mapping[str, Record]
  ) -> tuple[list[Record], collections.Counter[str]]:
    """The missing records at one threshold, and what they reuse of `previous`."""
    values, same = schedule_values(self._model, threshold), {}
    for i in missing:
      tokens = previous[i].tokens if i in previous else None
      if tokens is not None and reusable_tokens(previous[i], values) == len(tokens):
        same[i] = len(tokens)
    made = {i: previous[i] for i in same}
    if fresh := [i for i in missing if i not in made]:
      generation, begins = self._run(fresh, threshold, values)
      made |= {i: self._record(generation, i) for i in fresh}
      same |= begins
    records = [made[i] for i in missing]
    lengths = [len(record.tokens or ()) for record in records]
    kept = sum(min(same.get(i, 0), most) for i, most in zip(missing, lengths, strict=True))
    counts = {"sequences": len(records), "tokens": sum(lengths), "reused_tokens": kept}
    return records, collections.Counter(counts)

  def _run(
    self, fresh: Sequence[str], threshold: float, values: np.ndarray
  ) -> tuple[loop.Generation, dict[str, int]]:
    """The rows' generation, and how many of its tokens were not decoded again."""
    if self.encoded is None:
      self.encoded = self._model.encode(self._batch)
    places = {i: self._ids.index(i) for i in fresh}
    active = np.zeros(len(self._batch.active), bool)
    active[[*places.values()]] = True
    if not self._resumes:
      return self._model.decode(self.encoded, active, threshold), {}
    resume_at = np.zeros(len(active), np.int32)
    if self._state is not None:
      before = jax.device_get(self._state.generation)
      for i, place in places.items():
        record = self._record(before, i)
        same = reusable_tokens(record, values)
        # The last token is decoded again whatever the records say: there is a row to run.
        resume_at[place] = max(0, min(same, len(record.tokens or ()) - 1))
    self._state = self._model.resume(self.encoded, self._state, active, threshold, resume_at)
    begins = {i: int(resume_at[place]) for i, place in places.items()}
    return jax.device_get(self._state.generation), begins

  def _record(self, generation: loop.Generation, prompt_id: str) -> Record:
    return record(self._model, generation, self._ids.index(prompt_id), prompt_id)


def reusable_tokens(record: Record, thresholds: npt.ArrayLike) -> int:
  """Leading tokens of `record` that are the same when decoded with lower thresholds.

      the sequence is the same  iff  rejected_confidences[t] < new threshold, for all t

  since then no earlier layer would exit now. Up to the first t where this fails everything is
  the same, caches included. Comparisons are in float32, as in the decoder. A refusal of 0 may
  also mean that nothing was refused, so at threshold 0 less is kept than could be.

  Args:
    record: a generation at a higher threshold, `NEVER_EXIT` with measuring included.
    thresholds: [length] the schedule's value at every generated token of the new setting.
  """
  refused = np.asarray(record.rejected_confidences or (), np.float32)
  exits_now = refused >= np.asarray(thresholds, np.float32)[: len(refused)]
  return int(np.argmax(exits_now)) if exits_now.any() else len(refused)


def schedule_values(model: "Predictor", threshold: float) -> np.ndarray:
  """The schedule's threshold at every token, in float32 as the decoder has it."""
  positions = jnp.arange(model.options.max_decode_length)
  values = model.options.schedule(jnp.asarray(threshold, jnp.float32), positions)
  return np.broadcast_to(np.asarray(values), positions.shape)


def record(model: "Predictor", generation, row: int, prompt_id: str) -> Record:
  """One row of a generation as a record on disk."""
  output = model.output(generation, row)
  names = ("tokens", "exit_layers", "confidences", "rejected_confidences", "score")
  return Record(prompt_id, output.text, **{name: getattr(output, name) for name in names})


def generate(
  model: "Predictor",
  prompts: Sequence[Prompt],
  thresholds: Sequence[float],
  writer: Any,
  *,
  full: Sequence[Record] | None = None,
  encodings: dict[int, caches.Encoded] | None = None,
  progress: Progress = silent,
) -> collections.Counter[str]:
  """Decodes every prompt at full depth and at every threshold into `writer`.

  What the writer already has is not decoded again, so that a killed run goes on.

  Args:
    model, prompts: what decodes what; the prompts' ids name the records.
    thresholds: strictly descending, without `NEVER_EXIT`.
    writer: from `generations.open_writer` with the same prompts and thresholds; or a dictionary
      of {threshold: {id: record}}, which keeps them in memory.
    full: [num_prompts] full-depth records of `model.reference`, written as they are; None
      decodes them.
    encodings: encoded prompts by batch number, read and filled where several grids are decoded
      for the same prompts in the same batches by the same encoder.
    progress: told of the share done after every batch and threshold.

  Returns:
    Sequences, tokens and reused tokens of the grid.

  Raises:
    ValueError: the full-depth texts are another model's (`reference_digest`), not in `full`.
  """
  if full is None and (digest := model.options.reference_digest) is not None:
    raise ValueError(
      "Expected the full-depth texts of the model that was given, with which this promise"
      f" compares, got none (parameters {digest[:12]}); set `reference_digest` None for a"
      " promise about this model's own full depth."
    )
  known = None if full is None else {record.id: record for record in full}
  # Full depth is then a program of its own, which refuses nothing: no record follows from it.
  apart = known is not None or model.reference is not model
  levels = (NEVER_EXIT, *thresholds)
  summary = collections.Counter[str]()
  batches = model.plan([prompt.input for prompt in prompts])
  for number, batch in enumerate(batches):
    ids = [prompts[row].id for row in batch.rows]
    work = _Batch(model, batch, ids)
    work.encoded = None if encodings is None else encodings.get(number)
    previous: dict[str, Record] = {}
    for place, threshold in enumerate(levels):
      in_memory = isinstance(writer, dict)
      records = {} if in_memory else writer.completed_records(threshold, ids)
      if missing := [i for i in ids if i not in records]:
        if place == 0 and known is not None:
          made = [known[i] for i in missing]
        elif place == 0 and apart:
          reference = model.reference
          given = reference.encode(batch), batch.active, NEVER_EXIT, exits.StaticExit()
          generation = reference.decode(*given)
          made = [record(reference, generation, ids.index(i), i) for i in missing]
        else:
          made, reused = work.decode(missing, threshold, previous)
          summary = summary + reused if place else summary
        records.update({record.id: record for record in made})
        if in_memory:
          writer.setdefault(threshold, {}).update(records)
        else:
          writer.append(threshold, made)
      previous = {} if place == 0 and apart else records
      text = f"batch {number + 1} of {len(batches)}, threshold"
      share = (number * len(levels) + place + 1) / (len(batches) * len(levels))
      progress(share, f"{text} {thresholds_lib.format_threshold(threshold)}")
    if encodings is not None and work.encoded is not None:
      encodings[number] = work.encoded
  return summary


def on_grid(
  model: "Predictor",
  examples: Sequence[Prompt],
  thresholds: Sequence[float],
  folder: pathlib.Path,
  *,
  full: Sequence[Record] | None = None,
  encodings: dict[int, caches.Encoded] | None = None,
  progress: Progress = silent,
) -> generations.Generations:
  """`generate` into a folder inside `folder`, named after the procedure, prompts and grid.

  A finished run is read again.
  """
  procedure = model.procedure
  key = {
    "procedure": procedure.to_json(),
    "prompts": result_cache.prompts_digest(examples),
    "grid": list(map(float, thresholds)),
    **({} if full is None else {"full": "static"}),
  }
  path = folder / f"{procedure.measure}-{result_cache.digest(key)}"
  if (path / generations.MANIFEST).exists() and generations.read_manifest(path)["checksums"]:
    return generations.load(path)
  writer = generations.open_writer(
    path, prompts=examples, thresholds=thresholds, procedure=procedure
  )
  named = lambda share, text: progress(share, f"{procedure.measure} at {text}")
  generate(model, examples, thresholds, writer, full=full, encodings=encodings, progress=named)
  writer.finish()
  return generations.load(path)


def with_rule(
  model: "Predictor",
  examples: Sequence[Prompt],
  rule: exits.Rule | None = None,
  threshold: float = NEVER_EXIT,
  *,
  progress: Progress = silent,
) -> tuple[Record, ...]:
  """One record a prompt, in their order, of a rule (None: the model's own) at one threshold."""
  records: dict[int, Record] = {}
  batches = model.plan([example.input for example in examples])
  for number, batch in enumerate(batches):
    generation = model.decode(model.encode(batch), batch.active, threshold, rule)
    for i, row in enumerate(batch.rows):
      records[int(row)] = record(model, generation, i, examples[row].id)
    progress((number + 1) / len(batches), f"batch {number + 1} of {len(batches)}")
  return tuple(records[i] for i in range(len(examples)))


def mean_layers(records: Sequence[Record]) -> float:
  """Mean decoder layers over real tokens (NaN without tokens)."""
  layers = [layer for record in records for layer in record.exit_layers or () if layer]
  return float(np.mean(layers)) if layers else float("nan")


def in_bulk(model: "Predictor") -> "Predictor":
  """The same model for many prompts, where only the results count: twice the rows, one shape.

  Where a text depends on the rows that are decoded with it, and so on its padding, other
  batches would be another procedure's: the model as it is.
  """
  if options_lib.batch_size_affects_output(model.config, model.options):
    return model
  return one_shape(model.with_options(batch_size=2 * model.options.batch_size))


def one_shape(model: "Predictor") -> "Predictor":
  """The same model with every batch padded to one shape: one compiled program a rule."""
  return model.changed(one_shape=True)
