"""Prompts decoded over a grid, and the threshold certified on them (paper, section 4)."""

import contextlib
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from calm.calibrate import (
  Calibration,
  Prompt,
  Provenance,
  Record,
  calibrate,
  generations,
  metrics,
  planning,
)
from calm.calibrate import losses as sequence_losses
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import cache, order
from calm.data import prompt_files
from calm.inference import grid
from calm.inference.batch_decoder import BatchDecoder

# A user's word, and the kind of loss that it means.
KINDS = {"textual": "textual", "risk": "risk_signed"}


def kind_of(consistency: str) -> str:
  """The kind of loss by the paper's word for it.

  Raises:
    ValueError: the word is unknown.
  """
  if consistency in KINDS:
    return KINDS[consistency]
  if consistency in ("risk_signed", "risk_clipped"):
    return consistency
  raise ValueError(f"Expected `consistency` to be one of {sorted(KINDS)}, got {consistency!r}.")


def default_grid(model: BatchDecoder) -> Sequence[float]:
  """The model's grid, or its measure's own."""
  options = model.options
  return options.grid or thresholds_lib.default_grid(options.measure).tolist()


def certify(
  model: BatchDecoder,
  prompts: Sequence[Prompt | str | Mapping[str, Any]] | Any,
  *,
  tolerance: float,
  error_rate: float = 0.05,
  consistency: str = "textual",
  metric: metrics.MetricLike = "rouge_l",
  thresholds: Sequence[float] | None = None,
  folder: str | pathlib.Path | None = None,
  full: Sequence[Record] | None = None,
  progress: grid.Progress | None = None,
) -> tuple[Calibration, generations.Generations]:
  """Decodes prompts at full depth and over a grid, and calibrates the threshold on them.

  Args:
    model: the model under its options.
    prompts, tolerance, error_rate, consistency, metric, thresholds, progress: as for
      `Predictor.calibrate`.
    folder: keeps the generations, so that a run that was stopped goes on; None keeps none.
    full: [num_prompts] full-depth records; None decodes them.

  Returns:
    The calibration, and the generations that it was made from.

  Raises:
    ValueError: too few prompts for any threshold (says how many are needed), prompts without
      references for 'risk', or an argument has no meaning. Nothing is decoded then.
  """
  prompts, kind = prompt_files.prompts_of(prompts), kind_of(consistency)
  support = sequence_losses.kind_support(kind, metric)
  count = len(set(order.prompt_clusters(prompts)))
  unit = "prompts" if count == len(prompts) else "clusters of prompts"
  refusal = planning.refusal(count, tolerance, error_rate, lower=support.lower, unit=unit)
  if refusal:
    raise ValueError(refusal)
  bare = [prompt.id for prompt in prompts if not prompt.targets]
  if kind != "textual" and bare:
    raise ValueError(
      "Expected prompts with references (`targets`) for `consistency` 'risk', got"
      f" {len(bare)} without, first {bare[:3]}; take 'textual', or give references."
    )
  levels, temporary = thresholds or default_grid(model), folder is None
  with contextlib.ExitStack() as stack:
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    writer = cache.open_writer(
      folder,
      prompts=prompts,
      thresholds=levels,
      procedure=model.procedure,
      provenance=Provenance(grid=tuple(map(float, levels)), num_examples=len(prompts)),
    )
    grid.generate(model, prompts, levels, writer, full=full, progress=progress)
    writer.finish()
    # A temporary folder is gone by the time that its records are read.
    cached = generations.load(folder, in_memory=temporary)
  losses = sequence_losses.compute(cached, kind, metric=metric)
  return calibrate(losses, tolerance=tolerance, error_rate=error_rate), cached
