"""The folder that a fit writes: a model that serves itself, and the story of how it was made.

config.json, params.safetensors, vocabulary.*   the model
inference.json      prefix, lengths, measure, layers, schedule and grid
calibration.json    the promise, or that full depth is served and why
summary.md, .html   the numbers, the curve, texts coloured by exit layer
splits/             which row went where
fit/                training runs, gin files, generations and results: a stopped run goes on
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import calm
from calm import checkpoints, inference
from calm.calibrate import Calibration, seconds
from calm.calibrate.generations import files
from calm.fitting import summary
from calm.fitting.options import FitOptions
from calm.fitting.result import Result
from calm.inference import options as options_lib
from calm.inference import result_cache

_REQUEST = "request.json"


@dataclasses.dataclass(frozen=True)
class Folder:
  """An output folder at work.

  Attributes:
    path: what is served in the end.
    work: what only a later run of the same request reads.
    cache: results of finished steps.
  """

  path: pathlib.Path
  work: pathlib.Path
  cache: result_cache.ResultCache

  @classmethod
  def open(
    cls,
    path: pathlib.Path,
    request: Mapping[str, Any],
    begin: Callable[[], None] = lambda: None,
  ) -> "Folder":
    """Makes the folder, or goes on in it.

    Args:
      path: the folder.
      request: what names everything that is computed.
      begin: called before the folder is made; what it raises leaves no folder.

    Raises:
      ValueError: it holds the fit of another request (names the difference), or other things.
      OSError: it cannot be written.
    """
    work = path / "fit"
    there = work / _REQUEST
    request = json.loads(json.dumps(result_cache.to_json(request)))
    if there.is_file():
      _check_same(_stored_request(there), request, path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
      what = "has other files in it" if path.is_dir() else "is a file"
      raise ValueError(
        f"Expected `output` to be a new folder, or one that a fit has begun, got {str(path)!r},"
        f" which {what}; choose another name."
      )
    else:
      begin()
      try:
        work.mkdir(parents=True, exist_ok=True)
      except OSError as error:
        raise type(error)(
          f"Expected `output` to be a folder that can be written, got {str(path)!r}"
          f" ({error.strerror}); choose another."
        ) from error
      files.write_atomically(there, json.dumps(request, indent=1) + "\n")
    return cls(path, work, result_cache.ResultCache(work / "results"))

  def write(
    self,
    source: pathlib.Path,
    predictor: inference.Predictor,
    result: Result,
    calibration: Calibration | None,
    options: FitOptions,
  ) -> None:
    """Writes the model, its defaults, its promise, and the summary."""
    if options.learns_exits:
      checkpoints.copy_base(source, self.path)
      shutil.copyfile(self.work / checkpoints.EXITS, self.path / checkpoints.EXITS)
    else:
      # Stage two alone teaches no layer; without a stage the user says that they are trained.
      taught = options.stages == "none" or (result.serves_exits and options.changes_weights)
      checkpoints.save(
        self.path,
        predictor.params,
        predictor.config,
        vocabulary=predictor.vocabulary,
        exits_trained=True if taught else None,
      )
    stored = json.dumps(options_lib.to_stored(predictor.options), indent=1)
    files.write_atomically(self.path / "inference.json", stored + "\n")
    stale = inference.FULL_DEPTH if calibration is not None else inference.CALIBRATION
    (self.path / stale).unlink(missing_ok=True)
    if calibration is not None:
      calibration.save(self.path / inference.CALIBRATION)
    else:
      exact = inference.exact_rule(predictor) if result.exact else None
      about = {"reason": result.reason, "exact": exact and dataclasses.asdict(exact)}
      text = json.dumps(about, indent=1, ensure_ascii=False)
      files.write_atomically(self.path / inference.FULL_DEPTH, text + "\n")
    whole = {"calm": calm.__version__, "options": dataclasses.asdict(options)}
    text = json.dumps({**whole, **result_cache.to_json(result)}, indent=1, ensure_ascii=False)
    files.write_atomically(self.work / "result.json", text + "\n")
    for name, page in summary.pages(result, options, str(self.path)).items():
      files.write_atomically(self.path / name, page)


def _stored_request(path: pathlib.Path) -> dict[str, Any]:
  """What a fit was asked for, as it was written down when it began."""
  try:
    stored = files.parse_json(files.content(path))
  except ValueError as error:
    stored = str(error)
  if not isinstance(stored, dict) or not isinstance(stored.get("options"), dict):
    raise ValueError(
      f"Expected {str(path)!r} to be the request of a fit, with its `options`, got"
      f" {stored!r:.100}; restore it, or choose another folder."
    )
  return stored


def _check_same(there: Any, request: Any, path: pathlib.Path) -> None:
  before = there.get("options", {})
  differing = [
    f"`{name}` ({before.get(name)!r} there, {value!r} now)"
    for name, value in request["options"].items()
    if before.get(name) != value
  ]
  if there.get("model") != request["model"]:
    differing.append("the model's parameters")
  if there.get("rows") != request["rows"]:
    differing.append("the rows")
  if differing:
    raise ValueError(
      f"Expected `output` to be a new folder, or one of the same fit, got {str(path)!r}, whose"
      f" fit had other options: {', '.join(differing)}; choose another folder, or give the same"
      " again."
    )


def served(
  calibration: Calibration | None, reason: str, measured: seconds.Seconds | None
) -> Calibration | None:
  """The calibration that goes into the folder, with what was measured noted in it.

  Args:
    calibration: of the calibration part; None where nothing was worth certifying.
    reason: why full depth is served; '' where the certified threshold is.
    measured: seconds on the last part.

  Returns:
    None where full depth is served.
  """
  if calibration is None or reason:
    return None
  return seconds.noted(calibration, measured)
