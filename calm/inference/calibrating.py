"""Prompts decoded over a grid, and the threshold certified on them (paper, section 4)."""

import contextlib
import pathlib
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calm.calibrate import (
  Calibration,
  Prompt,
  Provenance,
  Record,
  calibrate,
  generations,
  ledger,
  planning,
)
from calm.calibrate import seconds as seconds_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations import order
from calm.calibrate.generations import writer as writer_lib
from calm.calibrate.losses import metrics, sequence_losses
from calm.console import Progress
from calm.data import prompt_files
from calm.inference import grid, seconds

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib

# Of the time that it takes to certify and to time, the share that decoding has.
_DECODING = 0.9
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


def certify(
  predictor: "predictor_lib.Predictor",
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
    predictor: the model under its options.
    prompts: [num_prompts] exchangeable prompts, which nothing else was chosen on, or a
      DataFrame of them (`prompt_files`); texts do for textual consistency.
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    consistency: 'textual' (distance to the full model's text) or 'risk' (loss of quality
      against references).
    metric: name, import path or function of the text metric.
    thresholds: strictly descending; None takes the model's grid, or the measure's own.
    folder: keeps the generations, so that a run that was stopped goes on; None keeps none.
    full: [num_prompts] full-depth records; None decodes them.
    progress: told after every batch and threshold.

  Returns:
    The calibration, and what it was made from.

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
  levels = thresholds or default_grid(predictor)
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
    grid.generate(predictor, prompts, levels, writer, full=full, progress=progress)
    writer.finish()
    # A folder that nobody asked for is gone by the time that its records are read.
    cached = generations.load(folder, in_memory=temporary)
  losses = sequence_losses.compute(cached, kind, metric=metric)
  return calibrate(losses, tolerance=tolerance, error_rate=error_rate), cached


def default_grid(predictor: "predictor_lib.Predictor") -> Sequence[float]:
  """The model's grid, or its measure's own."""
  options = predictor.options
  return options.grid or thresholds_lib.default_grid(options.measure).tolist()


def certify_and_time(
  predictor: "predictor_lib.Predictor",
  prompts: Sequence[Prompt | str | Mapping[str, Any]] | Any,
  *,
  thresholds: Sequence[float] | None = None,
  progress: grid.Progress | None = None,
  **options: Any,
) -> Calibration:
  """`certify`, and the seconds of what it certified beside full depth in its notes.

  A given folder has it in its ledger; a `UserWarning` says what else its prompts were asked.

  Args:
    predictor: the model under its options.
    prompts: as for `certify`.
    thresholds: as for `certify`.
    progress: told after every batch and threshold; None shows it where someone looks on.
    **options: the others of `certify`.
  """
  given, levels = prompt_files.prompts_of(prompts), thresholds or default_grid(predictor)
  with contextlib.ExitStack() as stack:
    silent = lambda share, text: None
    report = stack.enter_context(Progress()) if progress is None else silent
    decoded = lambda share, text: report(_DECODING * share, text)
    progress = progress or grid.as_shares(decoded, levels)
    made, _ = certify(predictor, given, thresholds=levels, progress=progress, **options)
    folder = options.get("folder")
    if folder is not None and (said := ledger.keep(folder, made, given)):
      warnings.warn(said, stacklevel=2)
    if not made.certified:
      return made
    texts = [prompt.input for prompt in given]
    timed = lambda share, text: report(_DECODING + (1 - _DECODING) * share, f"timing {text}")
    found = seconds.measure(
      predictor, texts, made.threshold, prompts=8, rounds=3, progress=timed
    )
  return seconds_lib.noted(made, found)
