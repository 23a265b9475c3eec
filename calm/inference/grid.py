"""Prompts x thresholds -> records, and the threshold that is certified on them
(paper, section
4) before serving, or while serving.

Prompts are encoded once for all thresholds. A sequence whose refused
confidences all stay below the next threshold is the same there and is not
decoded again, any other from the first token on where they do not
(`reusable_tokens`).
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from calm import exits, storage
from calm.calibrate import (
  NEVER_EXIT,
  Calibration,
  Online,
  Prompt,
  Record,
  calibrate,
  clusters,
  generations,
  metrics,
  planning,
)
from calm.calibrate import losses as sequence_losses
from calm.calibrate import thresholds as thresholds_lib
from calm.console import Report
from calm.data import prompt_files
from calm.inference import options as options_lib
from calm.inference import outputs
from calm.t5 import caches

if TYPE_CHECKING:
  from calm.inference.predictor import Predictor


def silent(share, text):
  return None


def part(progress: Report, start: float, end: float, name: str = "") -> Report:
  """A step's progress as a part of the whole's, under its name."""
  return lambda share, text: progress(
    start + share * (end - start), name + text
  )


class _Batch:
  """Prompts that are decoded together, threshold after threshold.

  Where rows are steps of one loop, caches stay on the device: at a lower
  threshold a sequence is the same up to the first token that would now leave
  earlier, and decoding goes on there.
  """

  def __init__(self, model: "Predictor", batch, ids: Sequence[str]):
    self._model = model
    self._batch = batch
    self._ids = ids
    self._state = None
    self._last: list[Record] = []  # of every row, as it was decoded last

  @functools.cached_property
  def _encoded(self) -> caches.Encoded:
    return self._model.encode(self._batch)

  def decode(self, threshold: float) -> list[Record]:
    """Every row's record at one threshold, some of them those of the threshold
    before.
    """
    options = self._model.options
    active = self._batch.active.copy()
    positions = jnp.arange(options.max_decode_length)
    # In float32, as the decoder has it.
    level = jnp.full(positions.shape, threshold, jnp.float32)
    values = np.asarray(options.schedule(level, positions))
    resume_at = np.zeros(len(active), np.int32)
    for row, last in enumerate(self._last):
      resume_at[row] = reusable_tokens(last, values)
      active[row] = resume_at[row] < len(last.tokens or ())
    if not active.any():
      return self._last
    # Each device would need its own loop's state; passes over drafts keep none.
    if options.num_devices == 1 and not options.rule.speculates:
      given = self._encoded, self._state, active, threshold, resume_at
      self._state = self._model.resume(*given)
      generation = jax.device_get(self._state.generation)
    else:
      generation = self._model.decode(self._encoded, active, threshold)
    self._last = [
      record(self._model.output(generation, row), name)
      if active[row]
      else self._last[row]
      for row, name in enumerate(self._ids)
    ]
    return self._last


def reusable_tokens(record: Record, thresholds: npt.ArrayLike) -> int:
  """Leading tokens of `record` that are the same when decoded with lower
  thresholds.

      the sequence is the same  iff  rejected_confidences[t] < new threshold,
      for all t

  since then no earlier layer would exit now; up to the first t where this fails
  everything is the same, caches included. Comparisons are in float32, as in the
  decoder. `thresholds` are the schedule's values [length] at every generated
  token of the new setting.
  """
  refused = np.asarray(record.rejected_confidences or (), np.float32)
  exits_now = refused >= np.asarray(thresholds, np.float32)[: len(refused)]
  return int(np.argmax(exits_now)) if exits_now.any() else len(refused)


def record(output: outputs.Output, prompt_id: str) -> Record:
  """An output as a record on disk."""
  names = (
    "tokens",
    "exit_layers",
    "confidences",
    "rejected_confidences",
    "score",
  )
  return Record(
    prompt_id, output.text, **{name: getattr(output, name) for name in names}
  )


def generate(
  model: "Predictor",
  prompts: Sequence[Prompt],
  thresholds: Sequence[float],
  writer: Any,
  *,
  full: Sequence[Record] | None = None,
  progress: Report = silent,
) -> None:
  """Decodes every prompt at full depth and at every threshold into `writer`.

  What the writer already has is left, so that a killed run goes on.

  Args:
    thresholds: strictly descending, without `NEVER_EXIT`.
    writer: from `generations.open_writer` with the same prompts and thresholds;
      or a dictionary of {threshold: {id: record}}, which keeps them in memory.
    full: [num_prompts] full-depth records of `model.reference`, written as they
      are; None decodes them.

  Raises:
    ValueError: the full-depth texts are another model's (`reference_digest`),
      not in `full`.
  """
  if full is None and (digest := model.options.reference_digest) is not None:
    raise ValueError(
      "Expected the full-depth texts of the model that was given, with which "
      "this promise"
      f" compares, got none (parameters {digest[:12]}); set "
      "`reference_digest` None for a"
      " promise about this model's own full depth."
    )
  known = None if full is None else {record.id: record for record in full}
  levels = (NEVER_EXIT, *thresholds)
  in_memory = isinstance(writer, dict)
  batches = model.plan([prompt.input for prompt in prompts])
  for number, batch in enumerate(batches):
    ids = [prompts[row].id for row in batch.rows]
    work = _Batch(model, batch, ids)
    for place, threshold in enumerate(levels):
      done = {} if in_memory else writer.completed_records(threshold, ids)
      if len(done) < len(ids):
        if place == 0 and known is not None:
          made = [known[i] for i in ids]
        elif place == 0 and (reference := model.reference) is not model:
          # A program that refuses nothing: no record follows from it.
          given = (
            reference.encode(batch),
            batch.active,
            NEVER_EXIT,
            exits.StaticExit(),
          )
          generation = reference.decode(*given)
          made = [
            record(reference.output(generation, row), i)
            for row, i in enumerate(ids)
          ]
        else:
          made = work.decode(threshold)
        if in_memory:
          writer.setdefault(threshold, {}).update(
            {each.id: each for each in made}
          )
        else:
          writer.append(
            threshold, [each for each in made if each.id not in done]
          )
      text = f"batch {number + 1} of {len(batches)}, threshold"
      share = (number * len(levels) + place + 1) / (len(batches) * len(levels))
      progress(share, f"{text} {thresholds_lib.format_threshold(threshold)}")


def on_grid(
  model: "Predictor",
  examples: Sequence[Prompt],
  thresholds: Sequence[float],
  folder: pathlib.Path,
  *,
  full: Sequence[Record] | None = None,
  progress: Report = silent,
) -> generations.Generations:
  """`generate` into a folder inside `folder`, named after the procedure,
  prompts and grid; a finished run is read again.
  """
  procedure = model.procedure
  key = {
    "procedure": procedure.to_json(),
    "prompts": storage.prompts_digest(examples),
    "grid": list(map(float, thresholds)),
    **({} if full is None else {"full": "static"}),
  }
  path = folder / f"{procedure.measure}-{storage.digest(key)}"
  if (path / generations.MANIFEST).exists() and generations.read_manifest(path)[
    "checksums"
  ]:
    return generations.load(path)
  return _in_folder(model, examples, thresholds, path, full, progress)


def _in_folder(
  model: "Predictor", prompts, thresholds, folder, full, progress
) -> generations.Generations:
  """`generate` into a folder, which is read back; None: a temporary one."""
  place = (
    tempfile.TemporaryDirectory()
    if folder is None
    else contextlib.nullcontext(folder)
  )
  with place as path:
    writer = generations.open_writer(
      path,
      prompts=prompts,
      thresholds=thresholds,
      procedure=model.procedure,
    )
    generate(model, prompts, thresholds, writer, full=full, progress=progress)
    writer.finish()
    return generations.load(path, in_memory=folder is None)


def with_rule(
  model: "Predictor",
  examples: Sequence[Prompt],
  rule: exits.Rule | None = None,
  threshold: float = NEVER_EXIT,
  *,
  progress: Report = silent,
) -> tuple[Record, ...]:
  """One record a prompt, in their order, of a rule (None: the model's own) at
  one threshold.
  """

  def report(done, of):
    return progress(done / max(of, 1), f"{done} of {of} prompts")

  made = model.decode_texts(
    [example.input for example in examples], threshold, rule, report
  )
  return tuple(
    record(o, example.id) for o, example in zip(made, examples, strict=True)
  )


def in_bulk(model: "Predictor") -> "Predictor":
  """The same model for many prompts, where only the results count: twice the
  rows, one shape.

  Where a text depends on the rows that are decoded with it, and so on its
  padding, other batches would be another procedure's: the model as it is.
  """
  if model.batch_size_affects_output:
    return model
  return model.with_options(batch_size=2 * model.options.batch_size).changed(
    one_shape=True
  )


# ---- Certified on a grid

Consistency = Literal["textual", "risk"]
# The kind of loss by the paper's word for it.
KINDS: Mapping[Consistency, str] = {"textual": "textual", "risk": "risk_signed"}


def default_grid(options: options_lib.DecodeOptions) -> Sequence[float]:
  return options.grid or thresholds_lib.default_grid(options.measure).tolist()


def certify(
  model: "Predictor",
  prompts: Sequence[Prompt | str | Mapping[str, Any]] | Any,
  *,
  tolerance: float,
  error_rate: float = 0.05,
  consistency: Consistency = "textual",
  metric: metrics.MetricLike = "rouge_l",
  thresholds: Sequence[float] | None = None,
  folder: str | pathlib.Path | None = None,
  full: Sequence[Record] | None = None,
  progress: Report = silent,
) -> tuple[Calibration, generations.Generations]:
  """Decodes prompts at full depth and over a grid, and calibrates the threshold
  on them.

  Arguments are those of `Predictor.calibrate`, and `full`: [num_prompts]
  full-depth records, if they are known. Returns the calibration, and the
  generations that it was made from.

  Raises:
    ValueError: too few prompts for any threshold (says how many are needed), or
      prompts without references for 'risk'. Nothing is decoded then.
  """
  prompts, kind = prompt_files.prompts_of(prompts), KINDS[consistency]
  support = sequence_losses.kind_support(kind, metric)
  unit = "prompts"
  if (count := len(set(clusters.prompt_clusters(prompts)))) < len(prompts):
    # Means of several losses of 0 or 1 are neither.
    support, unit = (
      dataclasses.replace(support, binary=False),
      "clusters of prompts",
    )
  if refusal := planning.refusal(
    count, tolerance, error_rate, support=support, unit=unit
  ):
    raise ValueError(refusal)
  bare = [prompt.id for prompt in prompts if not prompt.targets]
  if kind != "textual" and bare:
    raise ValueError(
      "Expected prompts with references (`targets`) for `consistency` "
      "'risk', got"
      f" {len(bare)} without, first {bare[:3]}; take 'textual', or give "
      "references."
    )
  levels = thresholds or default_grid(model.options)
  cached = _in_folder(model, prompts, levels, folder, full, progress)
  losses = sequence_losses.compute(cached, kind, metric=metric)
  return calibrate(losses, tolerance=tolerance, error_rate=error_rate), cached


def serve_online(
  model: Any,
  online: Online,
  texts: Sequence[str],
  ids: Sequence[str] | None,
  progress: Any,
  parts: Any = None,
) -> outputs.Outputs:
  """Texts at the threshold of a state, which learns from those of them that it
  draws.
  """
  if online.about.get("procedure") != model.procedure.digest():
    raise ValueError(
      "Expected `online` to be a state of this model under these options, "
      "got another's;"
      " open it with `Predictor.online`."
    )
  names = [clusters.fold_text(text) for text in texts] if ids is None else ids
  if len(names) != len(texts):
    raise ValueError(f"Expected `ids` of {len(texts)} texts, got {len(names)}.")
  served = online.threshold
  made = model.generate(texts, threshold=served, progress=progress, parts=parts)
  drawn: dict[str, str] = {}
  for name, text in zip(names, texts, strict=True):
    if online.should_check(name):
      drawn.setdefault(name, text)
  if drawn:
    observe(model, online, drawn)
  held = served != NEVER_EXIT and online.threshold <= served
  return dataclasses.replace(made, guarantee=online.guarantee if held else None)


def observe(
  model: "Predictor", online: Online, texts: Mapping[str, str]
) -> None:
  """Decodes drawn prompts at full depth and at open thresholds, for their
  textual losses.
  """
  levels = max((online.wanted(name) for name in texts), key=len)
  prompts = tuple(
    Prompt(f"{row}", text) for row, text in enumerate(texts.values())
  )
  columns: dict[float, dict[str, Record]] = {}
  generate(model, prompts, levels, columns)
  full, *early = (
    tuple(columns[level][prompt.id] for prompt in prompts)
    for level in (NEVER_EXIT, *levels)
  )
  made = generations.Generations(prompts, np.array(levels), tuple(early), full)
  losses = sequence_losses.prefix_losses(
    made, "textual", metric=online.about["metric"]
  )
  for name, row in zip(texts, np.stack(losses, axis=1).tolist(), strict=True):
    online.observe(name, dict(zip(levels, row, strict=True)))
