"""Prompts decoded over a grid, and the threshold certified on them (paper, section 4): before
serving, or while serving."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calm.calibrate import (
  NEVER_EXIT,
  Calibration,
  Online,
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
from calm.calibrate.generations import order
from calm.data import prompt_files
from calm.inference import grid, outputs
from calm.inference.options import DecodeOptions

if TYPE_CHECKING:
  from calm.inference.predictor import Predictor

# The paper's word for a consistency, or our own, and the kind of loss that it means.
_KINDS = {"risk": "risk_signed", **{k: k for k in ("textual", "risk_signed", "risk_clipped")}}


def kind_of(consistency: str) -> str:
  """The kind of loss by the paper's word for it."""
  if consistency in _KINDS:
    return _KINDS[consistency]
  raise ValueError(f"Expected `consistency` to be 'textual' or 'risk', got {consistency!r}.")


def default_grid(options: DecodeOptions) -> Sequence[float]:
  return options.grid or thresholds_lib.default_grid(options.measure).tolist()


def certify(
  model: "Predictor",
  prompts: Sequence[Prompt | str | Mapping[str, Any]] | Any,
  *,
  tolerance: float,
  error_rate: float = 0.05,
  consistency: str = "textual",
  metric: metrics.MetricLike = "rouge_l",
  thresholds: Sequence[float] | None = None,
  folder: str | pathlib.Path | None = None,
  full: Sequence[Record] | None = None,
  progress: grid.Progress = grid.silent,
) -> tuple[Calibration, generations.Generations]:
  """Decodes prompts at full depth and over a grid, and calibrates the threshold on them.

  Arguments are those of `Predictor.calibrate`, and `full`: [num_prompts] full-depth records, if
  they are known. Returns the calibration, and the generations that it was made from.

  Raises:
    ValueError: too few prompts for any threshold (says how many are needed), prompts without
      references for 'risk', or an argument has no meaning. Nothing is decoded then.
  """
  prompts, kind = prompt_files.prompts_of(prompts), kind_of(consistency)
  support = sequence_losses.kind_support(kind, metric)
  count = len(set(order.prompt_clusters(prompts)))
  unit = "prompts" if count == len(prompts) else "clusters of prompts"
  if count < len(prompts):  # means of several losses of 0 or 1 are neither
    support = dataclasses.replace(support, binary=False)
  refusal = planning.refusal(
    count, tolerance, error_rate, support=support, method="auto", unit=unit
  )
  if refusal:
    raise ValueError(refusal)
  bare = [prompt.id for prompt in prompts if not prompt.targets]
  if kind != "textual" and bare:
    raise ValueError(
      "Expected prompts with references (`targets`) for `consistency` 'risk', got"
      f" {len(bare)} without, first {bare[:3]}; take 'textual', or give references."
    )
  levels, temporary = thresholds or default_grid(model.options), folder is None
  with contextlib.ExitStack() as stack:
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
    writer = generations.open_writer(
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


def serve_online(
  model: Any,
  online: Online,
  texts: Sequence[str],
  ids: Sequence[str] | None,
  progress: Any,
  parts: Any = None,
) -> outputs.Outputs:
  """Texts at the threshold of a state, which learns from those of them that it draws."""
  if online.about.get("procedure") != model.procedure.digest():
    raise ValueError(
      "Expected `online` to be a state of this model under these options, got another's;"
      " open it with `Predictor.online`."
    )
  names = [order.fold_text(text) for text in texts] if ids is None else ids
  if len(names) != len(texts):
    raise ValueError(f"Expected `ids` of {len(texts)} texts, got {len(names)}.")
  served = online.threshold
  made = model.generate(texts, threshold=served, progress=progress, parts=parts)
  drawn: dict[str, int] = {}
  for row, name in enumerate(names):
    if online.should_check(name):
      drawn.setdefault(name, row)
  if drawn:
    observe(model, online, {name: texts[row] for name, row in drawn.items()})
  held = served != NEVER_EXIT and online.threshold <= served
  return dataclasses.replace(made, guarantee=online.guarantee if held else None)


def observe(model: "Predictor", online: Online, texts: Mapping[str, str]) -> None:
  """Decodes drawn prompts at full depth and at open thresholds, for their textual losses."""
  levels = max((online.wanted(name) for name in texts), key=len)
  prompts = tuple(Prompt(f"{row}", text) for row, text in enumerate(texts.values()))
  columns: dict[float, dict[str, Record]] = {}
  grid.generate(model, prompts, levels, columns)
  full, *early = (
    tuple(columns[level][prompt.id] for prompt in prompts) for level in (NEVER_EXIT, *levels)
  )
  made = generations.Generations(prompts, np.array(levels), tuple(early), full)
  losses = sequence_losses.prefix_losses(made, "textual", metric=online.about["metric"])
  for name, row in zip(texts, np.stack(losses, axis=1).tolist(), strict=True):
    online.observe(name, dict(zip(levels, row, strict=True)))
