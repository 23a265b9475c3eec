"""The result of a fit: its numbers, the folder that it writes, and the summary page.

config.json, params.safetensors, vocabulary.*   the model; exits.safetensors beside it
inference.json      prefix, lengths, measure, layers, schedule and grid
calibration.json    the promise; or full_depth.json, with the reason
summary.html        the numbers, and texts coloured by exit layer
splits/             the rows of every part
fit/                training runs, generations and results: a stopped run resumes
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import calm
from calm import checkpoints, inference, storage
from calm.calibrate import Calibration, thresholds
from calm.fitting.choose import Choice
from calm.fitting.exit_maps import LearnedExits
from calm.fitting.request import FitOptions
from calm.fitting.train import Trained
from calm.inference import options as options_lib
from calm.inference import panel, result_cache, timing
from calm.inference.panel import Panel

_REQUEST, SUMMARY = "request.json", "summary.html"


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over prompts with the half-width of its 95 % interval (normal)."""

  value: float
  margin: float
  count: int

  def __str__(self) -> str:
    return f"{self.value:.3f} ± {self.margin:.3f}"


@dataclasses.dataclass(frozen=True)
class LastLook:
  """The evaluation of the last part, which nothing was chosen or certified on."""

  quality_full: Mean | None  # metric against references, the given model at full depth
  quality_early: Mean | None  # under the calibrated threshold; None where full depth is served
  risk: Mean | None  # the controlled loss, whose mean is promised; None likewise
  layers: float  # decoder layers a token under the calibrated threshold


@dataclasses.dataclass(frozen=True)
class Point:
  """One threshold of the calibration part: layers a token, mean loss, upper bound of the
  expected loss for this threshold alone, whether the test passed it."""

  threshold: float
  layers: float
  risk: float
  bound: float
  certified: bool


@dataclasses.dataclass(frozen=True)
class Result:
  """The numbers of a fit."""

  model: str  # the given one
  sizes: str  # rows of every part, in words
  # The prompts that the promise is about, and other fits that certified on the same rows.
  population: str
  num_layers: int  # decoder layers of the model
  choice: Choice  # of the validation part
  threshold: float  # served; `NEVER_EXIT` where full depth is
  reason: str  # why full depth is served; '' where it is not
  guarantee: str  # the promise in words
  certified_threshold: float  # the lowest certified, also where it is not served
  seconds: timing.Seconds | None  # on the last part; None where nothing was certified
  last: LastLook  # the evaluation of the last part
  panel: Panel  # some of its prompts at every threshold, and what other tolerances certify
  # Seconds of full depth from the model's own verified drafts on the last part, where these are
  # faster; where full depth is served, it is served so.
  exact: timing.Seconds | None
  trained: tuple[Trained, ...] = ()  # the stages
  learned: LearnedExits | None = None  # beside frozen weights, where exits were learned
  curve: tuple[Point, ...] = ()  # the thresholds that were tested

  @property
  def serves_exits(self) -> bool:
    """Whether calibrated exits are served, and not full depth."""
    return self.threshold != thresholds.NEVER_EXIT

  @property
  def speed(self) -> str:
    """The speed-up of what is served, one prompt at a time, in a word."""
    served = self.seconds if self.serves_exits else self.exact
    return f"×{served.single.speedup:.2f}" if served else "×1"

  def headline(self, options: FitOptions) -> str:
    """The result in a sentence or two."""
    if not self.serves_exits:
      exact = self.exact and self.exact.single.speedup
      drafts = f", its own texts x{exact:.2f} as fast from verified drafts" if exact else ""
      return f"The given model is served at full depth{drafts}: {self.reason}"
    assert self.seconds is not None and self.last.risk is not None
    batch = self.seconds.batched
    more = "" if batch is None else f" (x{batch.speedup:.2f} in batches of {batch.batch_size})"
    trained = " The weights are trained ones; the promise is about the given model's texts."
    return (
      f"Decodes x{self.seconds.single.speedup:.2f} as fast as full depth{more}, at"
      f" {self.last.layers:.2f} of {self.num_layers} layers a token; measured risk"
      f" {self.last.risk} on {self.last.risk.count} prompts where {options.tolerance:g} is"
      f" promised.{trained if self.trained else ''}"
    )

  def advice(self, options: FitOptions) -> tuple[str, ...]:
    """What to do where full depth is served."""
    if self.serves_exits:
      return ()
    more = next(
      (delta for delta, at in self.panel.promised if at and delta > options.tolerance), 0
    )
    found = []
    if more:
      found.append(
        f"Allow more: on these rows something is certified at --tolerance={more:g}. Fit with"
        " it on new rows, as it was looked at on these."
      )
    elif self.certified_threshold == thresholds.NEVER_EXIT:
      found.append(
        "Allow more (--tolerance), or give more rows: both certify lower thresholds."
      )
    else:
      found.append(
        "Serve in batches, or a larger model: where a layer takes little time, leaving early"
        " saves little."
      )
    if not options.train_all:
      found.append("Train the weights for exits (--train_all), which changes the model.")
    return tuple(found)


# ---- The folder


def work_of(output: pathlib.Path) -> pathlib.Path:
  """The subfolder that only a later run of the same request reads."""
  return output / "fit"


def open_folder(output: pathlib.Path, request: Mapping[str, Any]) -> None:
  """Makes the output folder, or resumes in it.

  Args:
    output: the folder.
    request: everything that the output depends on.

  Raises:
    ValueError: it holds the fit of another request (names the difference), or other things.
    OSError: it cannot be written.
  """
  file = work_of(output) / _REQUEST
  if file.is_file():
    _check_same(file, json.loads(json.dumps(request)), output)
  elif output.exists() and (not output.is_dir() or any(output.iterdir())):
    what = "has other files in it" if output.is_dir() else "is a file"
    raise ValueError(
      f"Expected `output` to be a new folder, or one that a fit has begun, got {str(output)!r},"
      f" which {what}; choose another name."
    )
  else:
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise type(error)(
        f"Expected `output` to be a folder that can be written, got {str(output)!r}"
        f" ({error.strerror}); choose another."
      ) from error
    storage.write_atomically(file, json.dumps(request, indent=1) + "\n")


def write(
  output: pathlib.Path,
  source: pathlib.Path,
  predictor: inference.Predictor,
  result: Result,
  calibration: Calibration | None,
  options: FitOptions,
) -> None:
  """Writes the model, its defaults, its promise, and the summary."""
  if options.learns_exits:
    checkpoints.copy_base(source, output)
    shutil.copyfile(work_of(output) / checkpoints.EXITS, output / checkpoints.EXITS)
  else:
    # Without training the user says that the exits are trained.
    taught = options.stages == "none" or result.serves_exits
    checkpoints.save(
      output,
      predictor.params,
      predictor.config,
      vocabulary=predictor.vocabulary,
      exits_trained=True if taught else None,
    )

  def put(name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    storage.write_atomically(output / name, text + "\n")

  put("inference.json", options_lib.to_stored(predictor.options))
  if calibration is not None:
    (output / inference.FULL_DEPTH).unlink(missing_ok=True)
    calibration.save(output / inference.CALIBRATION)
  else:
    (output / inference.CALIBRATION).unlink(missing_ok=True)
    exact = inference.exact_rule(predictor) if result.exact else None
    about = {"reason": result.reason, "exact": exact and dataclasses.asdict(exact)}
    put(inference.FULL_DEPTH, about)
  whole = {"calm": calm.__version__, "options": dataclasses.asdict(options)}
  put("fit/result.json", {**whole, **result_cache.to_json(result)})
  storage.write_atomically(output / SUMMARY, summary(result, options, str(output)))


def _check_same(file: pathlib.Path, request: Any, path: pathlib.Path) -> None:
  """Refuses a stored request that is damaged or another one."""
  try:
    there = storage.parse_json(storage.content(file))
  except ValueError as error:
    there = str(error)
  if not isinstance(there, dict) or not isinstance(there.get("options"), dict):
    raise ValueError(
      f"Expected {str(file)!r} to be the request of a fit, with its `options`, got"
      f" {there!r:.100}; restore it, or choose another folder."
    )
  before = there["options"]
  differing = [
    f"`{name}` ({before.get(name)!r} there, {value!r} now)"
    for name, value in request["options"].items()
    if before.get(name) != value
  ]
  for key, words in (("model", "the model's parameters"), ("rows", "the rows")):
    differing += [words] if there.get(key) != request[key] else []
  if differing:
    raise ValueError(
      f"Expected `output` to be a new folder, or one of the same fit, got {str(path)!r}, whose"
      f" fit had other options: {', '.join(differing)}; choose another folder, or give the same"
      " again."
    )


def summary(result: Result, options: FitOptions, folder: str) -> str:
  """The summary as a page of HTML, which needs no network; its commands name the `folder`."""
  environment = panel.environment("calm.fitting", result.num_layers)
  return environment.get_template(f"{SUMMARY}.j2").render(
    result=result, options=options, folder=folder
  )
