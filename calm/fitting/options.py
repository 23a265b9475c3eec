"""What a fit is asked for, and how it reports progress."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from rich import console as rich_console

from calm import arguments
from calm.calibrate import metrics
from calm.console import Progress, Report, print_text
from calm.inference import certified

# The stages that a value of `FitOptions.stages` trains, in order.
STAGES = {
  "all": ("one", "own", "two"),
  "both": ("one", "two"),
  "none": (),
  "one": ("one",),
  "own": ("own", "two"),
  "two": ("two",),
}


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class FitOptions:
  """The options of `fit`; with the rows and the model they determine its output.

  Attributes:
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    train_all: whether all weights are trained, as in the paper (`stages`). By default exits are
      learned beside the model's weights, none of which changes.
    stages: the stages of `train_all`: 'one' (Eq. 6 over all layers, on references), 'own' (the
      layers learn the model's own texts, which needs no references, then stage two), 'two' (the
      exit classifier and probes, all other weights frozen), 'both' of the paper's, or 'all'.
      Without `train_all`, 'all' learns exits and 'none' uses the model's stored exits.
    consistency: 'textual' (distance to the full model's text) or 'risk' (loss of quality
      against the rows' references).
    metric: name or import path of the text metric, or a function at the top of a module,
      which is kept as its import path: a run that resumes is given the same one again.
    prefix: text put before every input; None uses the model's own.
    input_key: key of the text in a row of a file; None: the first of input, inputs, prompt
      and text.
    budget: seconds that `train_all` may take; None trains the recipe's number of steps.
    seed: of splits, training and sampling.
    batch_size: prompts that are decoded together.
    accept_quality: whether trained weights are served although their quality against references
      on the last part is below the 95 % interval of the original's, or unknown. It is not part
      of the request: a fit resumes with another value.
  """

  tolerance: float = 0.1
  error_rate: float = 0.05
  train_all: bool = False
  stages: str = "all"
  consistency: str = "textual"
  metric: metrics.MetricLike = "rouge_l"
  prefix: str | None = None
  input_key: str | None = None
  budget: float | None = None
  seed: int = 0
  batch_size: int = 8
  accept_quality: bool = False

  def __post_init__(self):
    for name in ("tolerance", "error_rate"):
      if not 0.0 < getattr(self, name) < 1.0:
        raise ValueError(f"Expected `{name}` in (0, 1), got {getattr(self, name)}.")
    if self.stages not in STAGES:
      raise ValueError(
        f"Expected `stages` to be one of {', '.join(STAGES)}, got {self.stages!r}."
      )
    if not self.train_all and self.stages not in ("all", "none"):
      raise ValueError(
        f"Expected `train_all` with `stages` {self.stages!r}, which train weights of the model,"
        " got none; add it (--train_all), or leave `stages` out to learn exits beside frozen"
        " weights."
      )
    if self.budget is not None and not self.train_all:
      raise ValueError(
        f"Expected `train_all` with `budget`, got {self.budget:g} s without; leave `budget`"
        " out: exits beside frozen weights are learned in seconds."
      )
    if self.budget is not None and not self.budget > 0:
      raise ValueError(f"Expected `budget` above 0 seconds, got {self.budget}.")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"Expected `seed` to be in 0 ... {2**32 - 1}, got {self.seed}.")
    certified.kind_of(self.consistency)
    object.__setattr__(self, "metric", metrics.metric_name(self.metric))

  @property
  def kind(self) -> str:
    """The loss that is controlled."""
    return certified.kind_of(self.consistency)

  @property
  def request(self) -> dict[str, Any]:
    """The options that determine the output."""
    return {k: v for k, v in dataclasses.asdict(self).items() if k != "accept_quality"}

  @property
  def trains(self) -> tuple[str, ...]:
    """The stages to train, in order."""
    return STAGES[self.stages] if self.train_all else ()

  @property
  def learns_exits(self) -> bool:
    """Whether exits are learned beside frozen weights."""
    return not self.train_all and self.stages != "none"

  @property
  def learns_own_texts(self) -> bool:
    """Whether a stage learns from texts that the model itself writes."""
    return bool({"own", "two"} & set(self.trains))

  @property
  def changes_weights(self) -> bool:
    """Whether training changes full depth's texts; stage two adds parameters only."""
    return bool({"one", "own"} & set(self.trains))

  @property
  def needs_targets(self) -> bool:
    """Whether every row needs a reference."""
    learned = "one" in self.trains or self.consistency != "textual"
    return learned or (self.changes_weights and not self.accept_quality)


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)")


def parse_budget(text: str) -> float:
  """Seconds of '90s', '30m', '1.5h', '1h30m'.

  Raises:
    ValueError: the text is no time.
  """
  lower = text.strip().lower()
  seconds = sum(float(number) * _UNITS[unit] for number, unit in _TIME.findall(lower))
  if _TIME.sub("", lower).strip() or not seconds > 0:
    raise ValueError(f"Expected `budget` to be a time like 90s, 30m or 1h30m, got {text!r}.")
  return seconds


@dataclasses.dataclass(frozen=True)
class Listener:
  """Callbacks of a fit; the default is silent.

  Attributes:
    say: called with a sentence.
    step: called with the title of a step; returns its progress callback (share, text).
  """

  say: Callable[[str], None] = lambda text: None
  step: Callable[[str], Report] = lambda title: lambda share, text: None


@contextlib.contextmanager
def on_screen(console: rich_console.Console) -> Iterator[Listener]:
  """A listener that prints sentences and draws the step's progress with its remaining time."""
  show = lambda text: print_text(console, text, soft_wrap=True)
  with Progress(console) as progress:

    def step(title: str) -> Report:
      number = title.partition(" ")[0]
      show(f"{title} ...")
      progress.restart(number)
      return lambda share, text: progress(share, f"{number} {text}")

    yield Listener(say=show, step=step)
    progress(1.0, "done")
