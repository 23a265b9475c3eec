"""What a fit is asked for."""

import dataclasses
import re
from typing import Any

from calm.calibrate import arguments
from calm.calibrate.losses import metrics
from calm.inference import calibrating

# What `stages` trains, in order; 'both' are the paper's two.
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
  """A fit's question; with the rows and the model it names everything that comes out.

  Attributes:
    tolerance: delta, in (0, 1).
    error_rate: epsilon, in (0, 1).
    train_all: whether all weights are trained, the paper's way (`stages`); else exits are
      learned beside the model's weights, none of which changes.
    stages: with `train_all`, what is trained: 'all'; 'both' of the paper's, 'one' (Eq. 6 over
      the layers, on references) and 'two' (the exit classifier and probes, everything else
      frozen), or one of them; 'own' (the layers learn what the model itself writes, which needs
      no references, and stage two). Without it 'all' learns exits, and 'none' takes those that
      the model has.
    consistency: 'textual' (distance to the full model's text) or 'risk' (loss of quality
      against the rows' targets).
    metric: name or import path of the text metric, or a function at the top of a module,
      which is kept as its import path: a run that goes on is given the same one again.
    prefix: text put before every input; None takes the model's own.
    input_key: where a row of a file has its text; None: the first of input, inputs, prompt
      and text.
    budget: with `train_all`, seconds that training may take; None trains as many steps as the
      recipe has.
    seed: of splits, training and draws.
    batch_size: prompts decoded together where nothing is timed.
    accept_quality: serve trained weights also where their quality against references on the
      last part is below the 95 % interval of the original's, or where rows without references
      leave it unknown. No part of the request: a fit goes on in its folder with another value.
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
    calibrating.kind_of(self.consistency)
    object.__setattr__(self, "metric", metrics.metric_name(self.metric))

  @property
  def kind(self) -> str:
    """The loss that is controlled."""
    return calibrating.kind_of(self.consistency)

  @property
  def request(self) -> dict[str, Any]:
    """What names everything that is computed."""
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
    """Whether full depth writes other texts after training; stage two adds parts alone."""
    return bool({"one", "own"} & set(self.trains))

  @property
  def needs_targets(self) -> bool:
    """Whether rows without references are of no use."""
    learned = "one" in self.trains or self.consistency != "textual"
    return learned or (self.changes_weights and not self.accept_quality)


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
  """Seconds of '90s', '30m', '1.5h', '1h30m'.

  Raises:
    ValueError: the text is no time.
  """
  parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
  seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
  rest = re.sub(r"(\d+(?:\.\d+)?)\s*([smh]?)|\s", "", text.strip().lower())
  if rest or not seconds > 0:
    raise ValueError(f"Expected `budget` to be a time like 90s, 30m or 1h30m, got {text!r}.")
  return seconds
