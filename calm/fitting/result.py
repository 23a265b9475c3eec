"""What a fit found, as a record of numbers that are written, shown and read again."""

import dataclasses

from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.seconds import Seconds
from calm.fitting.choose import Choice
from calm.fitting.options import FitOptions


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
  """The last part, which nothing was chosen or certified on.

  Attributes:
    quality_original: metric against references, the model as it was given, at full depth.
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
  """One prompt of the last part, shown."""

  prompt: str
  reference: str
  full: str
  text: str
  pieces: tuple[str, ...]
  exit_layers: tuple[int, ...]
  confidences: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Trained:
  """One training stage.

  Attributes:
    name: 'one', 'own' or 'two'.
    steps: updates made.
    seconds: wall-clock of this run.
    losses: (step, validation loss) of every validation.
    note: what more time would buy.
  """

  name: str
  steps: int
  seconds: float
  losses: tuple[tuple[int, float], ...]
  note: str


@dataclasses.dataclass(frozen=True)
class LearnedExits:
  """Exits that were learned beside frozen weights.

  Attributes:
    layers: 1-based.
    agreement_before, agreement_after: share of held-out tokens of the full model's texts whose
      argmax after each layer is the full model's, without the translator and with it.
    rank: of learned propagation.
    num_tokens: tokens of the model's own texts that were read.
    penalty: of the ridge regressions, relative to the mean square of a state's entry.
    seconds: of learning, without decoding these texts.
    base_digest: of the model's own parameters, before and after.
  """

  layers: tuple[int, ...]
  agreement_before: tuple[float, ...]
  agreement_after: tuple[float, ...]
  rank: int
  num_tokens: int
  penalty: float
  seconds: float
  base_digest: str

  def __str__(self) -> str:
    gains = ", ".join(
      f"layer {layer} {before:.2f} -> {after:.2f}"
      for layer, before, after in zip(
        self.layers, self.agreement_before, self.agreement_after, strict=True
      )
    )
    return (
      f"Exits learned in {self.seconds:.0f} s from {self.num_tokens} tokens; share of tokens"
      f" that agree with the full model: {gains}. The model's weights are unchanged (digest"
      f" {self.base_digest[:12]})."
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """A fit.

  Attributes:
    model: where the model came from.
    sizes: rows of every part, in words.
    population: the prompts that the promise is about, and other fits that certified on the same
      rows, in words.
    num_layers: decoder layers.
    trained: the stages.
    choice: what the validation part said.
    threshold: served; `NEVER_EXIT` where full depth is.
    reason: why full depth is served; '' where it is not.
    guarantee: the promise in words.
    certified_threshold: the lowest certified, also where it is not served.
    curve: the thresholds that were tested.
    seconds: on the last part; None where nothing was certified.
    last: the last look.
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

  @property
  def _exactly(self) -> str:
    if self.exact is None:
      return ""
    return f", its own texts x{self.exact.single.speedup:.2f} as fast from verified drafts"

  def _change(self, options: FitOptions) -> str:
    """What training did to full depth; '' where it changed no weight of it."""
    if not options.changes_weights:
      return ""
    before, after = self.last.quality_original, self.last.quality_full
    known = f"{options.metric} {after} against references where the given model has {before}"
    unknown = "without references nobody knows how well"
    return (
      "The weights are trained ones, and the promise is about their full depth, which writes"
      f" other texts than the given model ({known if after else unknown}). "
    )

  def headline(self, options: FitOptions) -> str:
    """The result in a sentence; before it, what training did to the weights that are served."""
    if not self.serves_exits:
      untouched = " by the given model, its weights untouched" if self.trained else ""
      return f"Full depth is served{untouched}{self._exactly}: {self.reason}"
    assert self.seconds is not None and self.last.risk is not None
    batch = self.seconds.batched
    more = "" if batch is None else f" (x{batch.speedup:.2f} in batches of {batch.batch_size})"
    return (
      f"{self._change(options)}Decodes x{self.seconds.single.speedup:.2f} as fast as full"
      f" depth{more}, at {self.last.layers:.2f} of {self.num_layers} layers a token; measured"
      f" risk {self.last.risk} on {self.last.risk.count} prompts where {options.tolerance:g} is"
      " promised."
    )
