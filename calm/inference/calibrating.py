"""Prompts decoded over a grid, and the threshold certified on them (paper, section 4)."""

import contextlib
import pathlib
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calm.calibrate import Calibration, Prompt, Provenance, calibrate, generations, planning
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.losses import sequence_losses
from calm.inference import grid

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib

# What a user says, and the loss that it means.
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


def as_prompts(prompts: Sequence[Prompt] | Sequence[str]) -> tuple[Prompt, ...]:
  """Prompts, texts among them named by their number."""
  if isinstance(prompts, str):
    raise TypeError("Expected `prompts` to be a list, got one text; put it in a list.")
  return tuple(
    Prompt(f"prompt/{i}", prompt) if isinstance(prompt, str) else prompt
    for i, prompt in enumerate(prompts, start=1)
  )


def certify(
  predictor: "predictor_lib.Predictor",
  prompts: Sequence[Prompt] | Sequence[str],
  *,
  tolerance: float,
  error_rate: float = 0.05,
  consistency: str = "textual",
  metric: str = "rouge_l",
  thresholds: Sequence[float] | None = None,
  folder: str | pathlib.Path | None = None,
  progress: grid.Progress | None = None,
) -> tuple[Calibration, generations.Generations]:
  """Decodes prompts at full depth and over a grid, and calibrates the threshold on them.

  Args:
    predictor: the model under its options.
    prompts: [num_prompts] exchangeable prompts, which nothing else was chosen on; texts do for
      textual consistency.
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    consistency: 'textual' (distance to the full model's text) or 'risk' (loss of quality
      against references).
    metric: name or import path of the text metric.
    thresholds: strictly descending; None takes the model's grid, or the measure's own.
    folder: keeps the generations, so that a run that was stopped goes on; None keeps none.
    progress: told after every batch and threshold.

  Returns:
    The calibration, and what it was made from.

  Raises:
    ValueError: too few prompts for any threshold (says how many are needed), prompts without
      references for 'risk', or an argument has no meaning. Nothing is decoded then.
  """
  prompts, kind = as_prompts(prompts), kind_of(consistency)
  support = sequence_losses.kind_support(kind, metric)
  refusal = planning.refusal(len(prompts), tolerance, error_rate, lower=support.lower)
  if refusal:
    raise ValueError(refusal)
  bare = [prompt.id for prompt in prompts if not prompt.targets]
  if kind != "textual" and bare:
    raise ValueError(
      "Expected prompts with references (`targets`) for `consistency` 'risk', got"
      f" {len(bare)} without, first {bare[:3]}; take 'textual', or give references."
    )
  options = predictor.options
  levels = thresholds or options.grid or thresholds_lib.default_grid(options.measure).tolist()
  temporary = folder is None
  with contextlib.ExitStack() as stack:
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    writer = writer_lib.open_writer(
      folder,
      prompts=prompts,
      thresholds=levels,
      procedure=predictor.procedure,
      provenance=Provenance(grid=tuple(map(float, levels)), num_examples=len(prompts)),
    )
    grid.generate(predictor, prompts, levels, writer, progress=progress)
    writer.finish()
    # A folder that nobody asked for is gone by the time that its records are read.
    cached = generations.load(folder, in_memory=temporary)
  losses = sequence_losses.compute(cached, kind, metric=metric)
  return calibrate(losses, tolerance=tolerance, error_rate=error_rate), cached
