"""The result of a fit: its numbers, the folder that it writes, and the summary
page.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

import calm
from calm import checkpoints, exits, inference, storage
from calm.calibrate import Calibration, thresholds
from calm.calibrate.testing import Row
from calm.fitting import request
from calm.fitting.choose import Choice
from calm.fitting.exit_maps import LearnedExits
from calm.fitting.train import Trained
from calm.inference import options as options_lib
from calm.inference import panel, timing

RESULT = "result.json"
SUMMARY = "summary.html"


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over prompts with the half-width of its 95 % interval (normal)."""

  value: float
  margin: float
  count: int

  @classmethod
  def of(cls, values: np.ndarray) -> "Mean":
    """Of values, one a prompt."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return cls(
      float(values.mean()), 1.96 * spread / len(values) ** 0.5, len(values)
    )

  def __str__(self) -> str:
    return f"{self.value:.3f} ± {self.margin:.3f}"


@dataclasses.dataclass(frozen=True)
class LastLook:
  """The evaluation of the last part, which nothing was chosen or certified
  on.
  """

  # metric against references, the given model at full depth
  quality_full: Mean | None
  # under the calibrated threshold; None where full depth is served
  quality_early: Mean | None
  # the controlled loss, whose mean is promised; None likewise
  risk: Mean | None
  layers: float  # decoder layers a token under the calibrated threshold


@dataclasses.dataclass(frozen=True)
class Result:
  """The numbers of a fit."""

  model: str  # the given one
  num_layers: int  # decoder layers of the model
  choice: Choice  # of the validation part
  threshold: float  # served; `NEVER_EXIT` where full depth is
  reason: str  # why full depth is served; '' where it is not
  guarantee: str  # the promise in words
  # the lowest certified, also where it is not served
  certified_threshold: float
  # on the last part; None where nothing was certified
  seconds: timing.Seconds | None
  last: LastLook  # the evaluation of the last part
  # some of its prompts at every threshold; what other tolerances certify
  panel: panel.Panel
  # Seconds of full depth from verified drafts on the last part, where these are
  # faster, and their rule; where full depth is served, it is served so.
  exact: timing.Seconds | None
  exact_rule: exits.Speculative | None
  trained: tuple[Trained, ...] = ()  # the stages
  # beside frozen weights, where exits were learned
  learned: LearnedExits | None = None
  tested: tuple[Row, ...] = ()  # thresholds on the calibration part

  @property
  def serves_exits(self) -> bool:
    """Whether calibrated exits are served, and not full depth."""
    return self.threshold != thresholds.NEVER_EXIT

  def headline(self, options: request.FitOptions) -> str:
    """The result in a sentence or two."""
    if not self.serves_exits:
      exact = self.exact and self.exact.single.speedup
      drafts = (
        f", its own texts x{exact:.2f} as fast from verified drafts"
        if exact
        else ""
      )
      return f"The given model is served at full depth{drafts}: {self.reason}"
    assert self.seconds is not None and self.last.risk is not None
    batch = self.seconds.batched
    risk = self.last.risk
    more = (
      ""
      if batch is None
      else f" (x{batch.speedup:.2f} in batches of {batch.batch_size})"
    )
    trained = (
      " The weights are trained ones; the promise is about the given model's "
      "texts."
    )
    return (
      f"Decodes x{self.seconds.single.speedup:.2f} as fast as full "
      f"depth{more}, at"
      f" {self.last.layers:.2f} of {self.num_layers} layers a token; "
      f"measured risk {risk} on"
      f" {risk.count} prompts where {options.tolerance:g} is promised."
      f"{trained if self.trained else ''}"
    )


# ---- The folder


def open_folder(output: pathlib.Path, asked: Mapping[str, Any]) -> None:
  """Makes the output folder, or resumes in it; `asked` is all that the output
  depends on. ValueError: it holds another request's fit, or other things;
  OSError: it cannot be written.
  """
  file = output / request.WORK / "request.json"
  if not file.is_file():
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
      what = "has other files in it" if output.is_dir() else "is a file"
      raise ValueError(
        "Expected `output` to be a new folder, or one that a fit has begun, got"
        f" {str(output)!r}, which {what}; choose another name."
      )
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(file, json.dumps(asked, indent=1) + "\n")
    return
  way_out = "restore it, or choose another folder"
  with storage.reading(
    file, "the request of a fit, with its `options`", way_out
  ):
    there = storage.parse_json(storage.content(file))
    before = there["options"].get
  asked = json.loads(json.dumps(asked))
  differing = [
    f"`{name}` ({before(name)!r} there, {value!r} now)"
    for name, value in asked["options"].items()
    if before(name) != value
  ]
  differing += [
    f"the {key}" for key in ("model", "rows") if there.get(key) != asked[key]
  ]
  if differing:
    raise ValueError(
      "Expected `output` to be a new folder, or one of the same fit, got "
      f"{str(output)!r},"
      f" whose fit had other options: {', '.join(differing)}; choose another "
      "folder, or give"
      " the same again."
    )


def write(
  fit: request.Fit,
  predictor: inference.Predictor,
  result: Result,
  calibration: Calibration | None,
) -> None:
  """Writes the model, its defaults, its promise, and the summary."""
  output = fit.output
  options = fit.options
  if options.learns_exits:
    checkpoints.copy_base(fit.initial, output)
    shutil.copyfile(fit.work / checkpoints.EXITS, output / checkpoints.EXITS)
  else:
    # Without training the user says that the exits are trained.
    trained = options.stages == "none" or result.serves_exits or None
    checkpoints.save(
      output,
      predictor.params,
      predictor.config,
      vocabulary=predictor.vocabulary,
      exits_trained=trained,
    )

  def put(name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    storage.write_atomically(output / name, text + "\n")

  put("inference.json", options_lib.to_stored(predictor.options))
  other = inference.CALIBRATION if calibration is None else inference.FULL_DEPTH
  (output / other).unlink(missing_ok=True)
  if calibration is not None:
    calibration.save(output / inference.CALIBRATION)
  else:
    exact = result.exact_rule and dataclasses.asdict(result.exact_rule)
    put(inference.FULL_DEPTH, {"reason": result.reason, "exact": exact})
  environment = panel.environment("calm.fitting", result.num_layers)
  page = environment.get_template(f"{SUMMARY}.j2")
  shown = page.render(
    fit=fit, result=result, options=options, folder=str(output)
  )
  storage.write_atomically(output / SUMMARY, shown)
  # The last file: a fit that has it is whole.
  about = {"calm": calm.__version__, "options": dataclasses.asdict(options)}
  put(f"{request.WORK}/{RESULT}", about | storage.to_json(result))
