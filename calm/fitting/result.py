"""The result of a fit: its numbers, the folder that it writes, and the summary page.

config.json, params.safetensors, vocabulary.*   the model; exits.safetensors beside it
inference.json      prefix, lengths, measure, layers, schedule and grid
calibration.json    the promise; or full_depth.json, with the reason
summary.md, .html   the numbers, the curve, texts coloured by exit layer
splits/             the rows of every part
fit/                training runs, generations and results: a stopped run resumes
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import markupsafe

import calm
from calm import checkpoints, inference, storage
from calm.calibrate import Calibration
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.seconds import Seconds
from calm.console import sanitize
from calm.fitting.choose import Choice
from calm.fitting.exit_maps import LearnedExits
from calm.fitting.options import FitOptions
from calm.fitting.train import Trained
from calm.inference import drawing, outputs, result_cache
from calm.inference import options as options_lib

_REQUEST = "request.json"


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
  """The evaluation of the last part, which nothing was chosen or certified on.

  Attributes:
    quality_original: metric against references, the given model at full depth.
    quality_full: the trained model at full depth, served or not; the same where nothing was
      trained.
    quality_early: under the calibrated threshold; None where full depth is served.
    risk: the controlled loss, whose mean is promised; None likewise.
    layers: decoder layers a token under the calibrated threshold.
  """

  quality_original: Mean | None
  quality_full: Mean | None
  quality_early: Mean | None
  risk: Mean | None
  layers: float


@dataclasses.dataclass(frozen=True)
class Point:
  """One threshold of the calibration part.

  Attributes:
    threshold: lambda.
    layers: decoder layers a token.
    risk: mean loss.
    bound: upper bound of the expected loss, for this threshold alone.
    certified: whether the test passed it.
    count: prompts.
  """

  threshold: float
  layers: float
  risk: float
  bound: float
  certified: bool
  count: int


@dataclasses.dataclass(frozen=True)
class ShownText:
  """A prompt of the last part with its texts.

  Attributes:
    prompt: the input.
    reference: its first reference; '' without.
    full: the full model's text.
    text: the served text.
    pieces: its tokens as pieces.
    exit_layers: of each piece.
    confidences: of each piece; empty where unknown.
  """

  prompt: str
  reference: str
  full: str
  text: str
  pieces: tuple[str, ...]
  exit_layers: tuple[int, ...]
  confidences: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Result:
  """The numbers of a fit.

  Attributes:
    model: the given model.
    sizes: rows of every part, in words.
    population: the prompts that the promise is about, and other fits that certified on the same
      rows, in words.
    num_layers: decoder layers of the model.
    trained: the stages.
    choice: of the validation part.
    threshold: served; `NEVER_EXIT` where full depth is.
    reason: why full depth is served; '' where it is not.
    guarantee: the promise in words.
    certified_threshold: the lowest certified, also where it is not served.
    curve: the thresholds that were tested.
    seconds: on the last part; None where nothing was certified.
    last: the evaluation of the last part.
    examples: some of its prompts.
    exact: seconds of full depth from the model's own verified drafts on the last part, where
      these are faster; where full depth is served, it is served so.
    learned: the exits beside frozen weights; None where none were learned.
  """

  model: str
  sizes: str
  population: str
  num_layers: int
  trained: tuple[Trained, ...]
  choice: Choice
  threshold: float
  reason: str
  guarantee: str
  certified_threshold: float
  curve: tuple[Point, ...]
  seconds: Seconds | None
  last: LastLook
  examples: tuple[ShownText, ...]
  exact: Seconds | None = None
  learned: LearnedExits | None = None

  @property
  def serves_exits(self) -> bool:
    """Whether calibrated exits are served, and not full depth."""
    return self.threshold != thresholds_lib.NEVER_EXIT

  def headline(self, options: FitOptions) -> str:
    """The result in a sentence; before it, what training did to the weights that are served."""
    if not self.serves_exits:
      untouched = " by the given model, its weights untouched" if self.trained else ""
      exact = self.exact and self.exact.single.speedup
      drafts = f", its own texts x{exact:.2f} as fast from verified drafts" if exact else ""
      return f"Full depth is served{untouched}{drafts}: {self.reason}"
    assert self.seconds is not None and self.last.risk is not None
    changed = ""
    if options.changes_weights:
      before, after = self.last.quality_original, self.last.quality_full
      known = f"{options.metric} {after} against references where the given model has {before}"
      changed = (
        "The weights are trained ones; the promise is about the texts of the given model, from"
        " which their own full depth differs"
        f" ({known if after else 'without references nobody knows how well'}). "
      )
    batch = self.seconds.batched
    more = "" if batch is None else f" (x{batch.speedup:.2f} in batches of {batch.batch_size})"
    return (
      f"{changed}Decodes x{self.seconds.single.speedup:.2f} as fast as full depth{more}, at"
      f" {self.last.layers:.2f} of {self.num_layers} layers a token; measured risk"
      f" {self.last.risk} on {self.last.risk.count} prompts where {options.tolerance:g} is"
      " promised."
    )


# ---- The folder


@dataclasses.dataclass(frozen=True)
class Folder:
  """An output folder.

  Attributes:
    path: of the served model.
    work: the subfolder that only a later run of the same request reads.
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
    """Makes the folder, or resumes in it.

    Args:
      path: the folder.
      request: everything that the output depends on.
      begin: called before the folder is made; an error that it raises leaves no folder.

    Raises:
      ValueError: it holds the fit of another request (names the difference), or other things.
      OSError: it cannot be written.
    """
    work = path / "fit"
    there = work / _REQUEST
    request = json.loads(json.dumps(result_cache.to_json(request)))
    if there.is_file():
      _check_same(there, request, path)
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
      storage.write_atomically(there, json.dumps(request, indent=1) + "\n")
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
    storage.write_atomically(self.path / "inference.json", stored + "\n")
    stale = inference.FULL_DEPTH if calibration is not None else inference.CALIBRATION
    (self.path / stale).unlink(missing_ok=True)
    if calibration is not None:
      calibration.save(self.path / inference.CALIBRATION)
    else:
      exact = inference.exact_rule(predictor) if result.exact else None
      about = {"reason": result.reason, "exact": exact and dataclasses.asdict(exact)}
      text = json.dumps(about, indent=1, ensure_ascii=False)
      storage.write_atomically(self.path / inference.FULL_DEPTH, text + "\n")
    whole = {"calm": calm.__version__, "options": dataclasses.asdict(options)}
    text = json.dumps({**whole, **result_cache.to_json(result)}, indent=1, ensure_ascii=False)
    storage.write_atomically(self.work / "result.json", text + "\n")
    for name, page in pages(result, options, str(self.path)).items():
      storage.write_atomically(self.path / name, page)


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


# ---- The summary


def pages(result: Result, options: FitOptions, folder: str) -> Mapping[str, str]:
  """File name -> text of the summaries, which need no network.

  Args:
    result: the fit.
    options: of the fit.
    folder: where it lies, for the commands that are shown.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("calm.fitting", "templates"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    # Control and direction marks of other people's texts are made visible.
    finalize=lambda value: sanitize(value) if type(value) is str else value,
    autoescape=jinja2.select_autoescape(["html.j2"]),
  )
  environment.filters["number"] = lambda value, digits=2: (
    "–" if math.isnan(value) else f"{value:.{digits}f}"
  )
  environment.filters["times"] = lambda value: "–" if math.isnan(value) else f"x{value:.2f}"
  environment.filters["threshold"] = thresholds_lib.format_threshold
  values = {
    "result": result,
    "options": options,
    "folder": folder,
    "headline": result.headline(options),
    "certified": result.last.risk is not None,
    "never": thresholds_lib.NEVER_EXIT,
  }
  figure, layers = curve(result, options), result.num_layers
  html = environment.get_template("summary.html.j2").render(
    **values,
    figure=None if figure is None else markupsafe.Markup(figure.inline),
    coloured=lambda example: markupsafe.Markup(
      outputs.to_html(
        example.pieces,
        example.exit_layers,
        layers,
        confidences=example.confidences or None,
        legend=False,
      )
    ),
    legend=markupsafe.Markup(outputs.legend_html(layers)),
  )
  plain = lambda example: outputs.to_terminal(
    example.pieces, example.exit_layers, layers, mode="plain"
  )
  markdown = environment.get_template("summary.md.j2").render(
    **values, plain=lambda example: " ".join(plain(example).replace("`", "'").split())
  )
  return {"summary.md": markdown, "summary.html": html}


def curve(result: Result, options: FitOptions) -> drawing.Figure | None:
  """Risk and its bound against decoder layers on the calibration part; None without it."""
  if not result.curve:
    return None
  points = sorted(result.curve, key=lambda point: point.layers)
  layers = [point.layers for point in points]

  def paint(axes) -> None:
    risks, bounds = [p.risk for p in points], [p.bound for p in points]
    axes.plot(layers, risks, marker="o", color="#0072b2", label="mean loss")
    axes.plot(layers, bounds, linestyle="--", color="#d55e00", label="upper bound")
    dotted = {"color": drawing.INK, "linewidth": 0.9, "linestyle": ":"}
    axes.axhline(options.tolerance, label="tolerance", **dotted)
    for point in points:
      if point.threshold == result.certified_threshold:
        star = {"marker": "*", "markersize": 13, "color": "#009e73", "linestyle": "none"}
        axes.plot([point.layers], [point.risk], label="certified", **star)
    axes.set_xlabel("mean decoder layers a token")
    axes.set_ylabel(f"{options.kind} loss, {options.metric}")

  title = f"Fewer layers, more risk: {options.tolerance:g} is promised"
  caption = (
    f"{points[0].count} calibration prompts, one point a threshold. The certified threshold is"
    " the lowest that the test passed, from the right to the left."
  )
  return drawing.draw("curve", title, caption, paint)
