"""Prompts under any rule, or over a whole grid, as records; both can be stopped and go on."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from calm import exits
from calm.calibrate import Prompt, Record, generations
from calm.calibrate.generations import writer as writer_lib
from calm.data import prompt_batches
from calm.exits import schedules
from calm.inference import grid, procedures, result_cache
from calm.inference.predictor import Predictor
from calm.t5 import caches

# (share done in [0, 1], what is being done)
Progress = Callable[[float, str], None]


def silent(share: float, text: str) -> None:
  """A `Progress` that shows nothing."""
  del share, text


def with_rule(
  predictor: Predictor,
  examples: Sequence[Prompt],
  rule: exits.Rule | None = None,
  threshold: float = schedules.NEVER_EXIT,
  *,
  progress: Progress = silent,
) -> tuple[Record, ...]:
  """Decodes prompts under a rule (None: the predictor's own) at one threshold.

  Returns:
    One record a prompt, in the order of `examples`.
  """
  found: dict[int, Record] = {}
  batches = predictor.plan([example.input for example in examples])
  for number, batch in enumerate(batches):
    generation = predictor.decode(predictor.encode(batch), batch.active, threshold, rule)
    for i, row in enumerate(batch.rows):
      found[int(row)] = grid.record(predictor, generation, i, examples[row].id)
    progress((number + 1) / len(batches), f"batch {number + 1} of {len(batches)}")
  return tuple(found[i] for i in range(len(examples)))


def mean_layers(records: Sequence[Record]) -> float:
  """Mean decoder layers over real tokens (NaN without tokens)."""
  layers = [layer for record in records for layer in record.exit_layers or () if layer]
  return float(np.mean(layers)) if layers else float("nan")


def on_grid(
  predictor: Predictor,
  examples: Sequence[Prompt],
  thresholds: Sequence[float],
  folder: pathlib.Path,
  *,
  full: Sequence[Record] | None = None,
  encodings: dict[int, caches.Encoded] | None = None,
  progress: Progress = silent,
) -> generations.Generations:
  """Decodes prompts at full depth and at every threshold, into (and out of) a folder.

  Args:
    predictor: the model under its own rule.
    examples: the prompts.
    thresholds: strictly descending.
    folder: parent of the run's folder, which is named after the procedure, prompts and grid.
    full: records of the full-depth program, taken as the full model's; None decodes them.
    encodings: see `grid.generate`.
    progress: told of thresholds.
  """
  procedure = predictor.procedure
  key = {
    "procedure": procedure.to_json(),
    "prompts": result_cache.prompts_digest(examples),
    "grid": list(map(float, thresholds)),
    **({} if full is None else {"full": "static"}),
  }
  path = folder / f"{procedure.measure}-{result_cache.digest(key)}"
  if (path / generations.MANIFEST).exists() and generations.read_manifest(path)["checksums"]:
    return generations.load(path)
  writer = writer_lib.open_writer(
    path, prompts=examples, thresholds=thresholds, procedure=procedure
  )

  def advance(threshold: float, number: int, count: int) -> None:
    # Within a batch thresholds descend; never exit comes first.
    done = 0 if threshold == schedules.NEVER_EXIT else list(thresholds).index(threshold) + 1
    share = (number + (done + 1) / (len(thresholds) + 1)) / count
    progress(share, f"{procedure.measure} at threshold {threshold:.4g}")

  grid.generate(
    predictor,
    examples,
    thresholds,
    writer,
    full=full,
    encodings=encodings,
    progress=advance,
  )
  writer.finish()
  return generations.load(path)


class OneShape(Predictor):
  """A predictor that pads every batch to one shape: one compiled program a rule.

  Many rules over few prompts are compiled for longer than they run. Rows are independent, so
  what comes out is the same (but for last bits, which decide where states are narrower than
  float32; see `in_bulk`).
  """

  def plan(self, texts: Sequence[str]) -> list[prompt_batches.PromptBatch]:
    size, length = self.options.batch_size, self.options.max_input_length
    order = sorted(super().plan(texts), key=lambda batch: batch.tokens.shape[1])
    rows = np.concatenate([batch.rows for batch in order]) if order else np.zeros(0, int)
    tokens = np.zeros((len(rows), length), np.int32)
    first = 0
    for batch in order:
      count = len(batch.rows)
      tokens[first : first + count, : batch.tokens.shape[1]] = batch.tokens[:count]
      first += count
    return [
      _padded(rows[start : start + size], tokens[start : start + size], size)
      for start in range(0, len(rows), size)
    ]


def one_shape(predictor: Predictor) -> OneShape:
  """The same model with `OneShape`'s batches."""
  fields = dataclasses.fields(Predictor)
  made = OneShape(**{field.name: getattr(predictor, field.name) for field in fields})
  return predictor.sharing(made)


def in_bulk(predictor: Predictor) -> Predictor:
  """The same model for many prompts, where only what comes out counts.

  Twice the rows, in `OneShape`'s batches. Where a text depends on the rows that it is decoded
  with, and so on its padding, other batches would be another procedure's: the model as it is.
  """
  if procedures.batch_size_affects_output(predictor.config, predictor.options):
    return predictor
  return one_shape(predictor.with_options(batch_size=2 * predictor.options.batch_size))


def _padded(rows: np.ndarray, tokens: np.ndarray, size: int) -> prompt_batches.PromptBatch:
  whole = np.zeros((size, tokens.shape[1]), np.int32)
  whole[: len(tokens)] = tokens
  return prompt_batches.PromptBatch(rows, whole, np.arange(size) < len(rows))


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
  """One prompt ready to be decoded alone, any number of times.

  Attributes:
    id: of the prompt.
    batch: its tokens, a batch of one.
    encoded: what the decoder reads.
  """

  id: str
  batch: prompt_batches.PromptBatch
  encoded: caches.Encoded


def one_by_one(predictor: Predictor, examples: Sequence[Prompt]) -> tuple[EncodedPrompt, ...]:
  """Encodes prompts one at a time, in the order of `examples`."""
  one = predictor.with_options(batch_size=1)
  found = {}
  for batch in one.plan([example.input for example in examples]):
    row = int(batch.rows[0])
    found[row] = EncodedPrompt(
      examples[row].id, batch, jax.block_until_ready(one.encode(batch))
    )
  return tuple(found[row] for row in range(len(examples)))


def of_one_length(
  predictor: Predictor, examples: Sequence[Prompt], limit: int | None = None
) -> tuple[Prompt, ...]:
  """The first prompts that have the commonest padded length: one compilation times them all."""
  batches = predictor.with_options(batch_size=1).plan([example.input for example in examples])
  lengths = np.array([batch.tokens.shape[1] for batch in batches])
  rows = np.array([int(batch.rows[0]) for batch in batches])
  common = np.bincount(lengths).argmax()
  return tuple(examples[row] for row in sorted(rows[lengths == common])[:limit])
