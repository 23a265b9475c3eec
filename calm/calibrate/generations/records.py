"""Prompts and outputs as lines of JSON, with errors that name the file and the line."""

import dataclasses
import functools
import math
import numbers
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from calm import arguments, storage
from calm.calibrate import checks

# Cached generations that cannot be used; the message names the file and the line.
GenerationsError = storage.FormatError


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt.

  Attributes:
    id: unique name.
    input: text, without task prefix.
    targets: accepted references, best first (may be empty); a lone text is one.
    group: name of the cluster that the prompt belongs to (its source), or None.

  Raises:
    ValueError: `id` or `input` is no text, or targets are no texts.
  """

  id: str
  input: str
  targets: tuple[str, ...] = ()
  group: str | None = None

  def __post_init__(self):
    _require_text(vars(self), "id")
    _require_text(vars(self), "input")
    targets, group = self.targets, self.group
    listed = arguments.is_listing(targets)
    texts = () if not listed else (targets,) if isinstance(targets, str) else tuple(targets)
    if not listed or not all(isinstance(target, str) for target in texts):
      raise ValueError(f"Expected `targets` to be a list of texts, got {targets!r}")
    if not isinstance(group, str | numbers.Integral | None) or isinstance(group, bool):
      raise ValueError(f"Expected `group` to be a text, a whole number or null, got {group!r}")
    for target in texts:
      _require_unicode(target, "targets")
    _require_unicode(str(group), "group")
    object.__setattr__(self, "targets", texts)
    object.__setattr__(self, "group", None if group is None else str(group))

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values."""
    return {**dataclasses.asdict(self), "targets": list(self.targets)}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Prompt":
    """Reads `to_json`'s form, or a data-set row: {id, input, target or references, source}.

    Raises:
      ValueError: `id` or `input` is missing or no text, targets are no texts, or a text holds
        half of a surrogate pair.
    """
    field: Any = value.get
    targets = field("targets", field("references", field("target")))
    texts = () if targets is None else targets
    return cls(field("id"), field("input"), texts, field("group", field("source")))


@dataclasses.dataclass(frozen=True)
class Record:
  """One output. What foreign files lack is None.

  Attributes:
    id: the prompt's id.
    prediction: decoded text.
    tokens: [length] generated tokens, EOS included, nothing after it.
    exit_layers: [length] decoder layers run for each token (1-based).
    confidences: [length] confidence at the exit, in [0, 1].
    rejected_confidences: [length] highest confidence that was evaluated and refused at that
      token, 0 if none.
    score: sum of the emitted tokens' log-probabilities, nats.
  """

  id: str
  prediction: str
  tokens: tuple[int, ...] | None = None
  exit_layers: tuple[int, ...] | None = None
  confidences: tuple[float, ...] | None = None
  rejected_confidences: tuple[float, ...] | None = None
  score: float | None = None

  def __post_init__(self):
    _require_text(vars(self), "id")
    _require_text(vars(self), "prediction")
    lengths = {}
    for name, (kind, convert) in _SEQUENCES.items():
      values = getattr(self, name)
      if values is None:
        continue
      if isinstance(values, str) or not arguments.is_listing(values):
        raise ValueError(f"Expected `{name}` to be a list of {kind}, got {values!r}")
      try:
        values = tuple(map(convert, values))
      except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
          f"Expected `{name}` of {self.id!r} to be a list of {kind}, got {error}"
        ) from None
      object.__setattr__(self, name, values)
      lengths[name] = len(values)
    if len(set(lengths.values())) > 1:
      raise ValueError(
        f"Expected the sequences of {self.id!r} to have one length, got {lengths}; give each an"
        " entry for every token"
      )
    if self.score is not None:
      score = self.score
      real = isinstance(score, numbers.Real) and not isinstance(score, bool)
      if not real or not math.isfinite(float(score)):
        raise ValueError(f"Expected `score` to be a finite number (nats), got {score!r}")
      object.__setattr__(self, "score", float(score))

  def to_json(self) -> dict[str, Any]:
    """The fields that are there, as JSON values."""
    value = {name: getattr(self, name) for name in _RECORD_FIELDS}
    return {
      name: list(field) if isinstance(field, tuple) else field
      for name, field in value.items()
      if field is not None
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Record":
    """The inverse of `to_json`; unknown fields are ignored.

    Raises:
      ValueError: `id` or `prediction` is missing, or sequences disagree in length.
    """
    _require_text(value, "id")
    _require_text(value, "prediction")
    return cls(**{name: value[name] for name in _RECORD_FIELDS if name in value})


def _whole(most: int, value: Any) -> int:
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not whole or not 0 <= int(value) <= most:
    raise ValueError(repr(value))
  return int(value)


def _confidence(value: Any) -> float:
  """As written: a numpy float32 keeps its short digits (0.9, not 0.89999998)."""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(repr(value))
  number = float(str(value)) if hasattr(value, "dtype") else float(value)
  if not -_ROUNDING <= number <= 1 + _ROUNDING:  # NaN and infinities too
    raise ValueError(repr(value))
  return number


# Float32 cosines and softmax margins pass their bounds by so much.
_ROUNDING = 1e-5
# Field: what its values are, and a conversion of each that raises ValueError with what was got.
_SEQUENCES = {
  "tokens": (f"whole numbers in 0 ... {2**31 - 1}", functools.partial(_whole, 2**31 - 1)),
  "exit_layers": (f"whole numbers in 0 ... {2**10}", functools.partial(_whole, 2**10)),
  "confidences": ("numbers in [0, 1]", _confidence),
  "rejected_confidences": ("numbers in [0, 1]", _confidence),
}
_RECORD_FIELDS = ("id", "prediction", *_SEQUENCES, "score")


def _require_text(value: Mapping[str, Any], name: str) -> None:
  if not isinstance(value.get(name), str):
    raise ValueError(f"Expected `{name}` to be a text, got {value.get(name)!r}")
  _require_unicode(value[name], name)


def _require_unicode(text: str, name: str) -> None:
  """ValueError for half of a surrogate pair, which JSON can hold and no file in UTF-8."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(
      f"Expected `{name}` to be Unicode, got half of a surrogate pair, {text[error.start]!r},"
      f" at character {error.start + 1}"
    ) from None


def read_prompts(path: str | pathlib.Path) -> tuple[Prompt, ...]:
  """Reads prompts from JSON Lines of {id, input, targets or target, group or source}.

  Raises:
    GenerationsError: a line is no prompt, an id occurs twice, or there is no prompt at all.
  """
  prompts: dict[str, Prompt] = {}
  for line in storage.read_lines(path):
    try:
      prompt = Prompt.from_json(line.value)
    except (TypeError, ValueError) as error:
      raise line.error(
        f"expected a prompt, got none: {error}; give each an `id` and an `input`, both texts."
      ) from error
    if prompt.id in prompts:
      raise line.error(
        f"expected every id once, got {prompt.id!r} twice; give every prompt its own."
      )
    prompts[prompt.id] = prompt
  if not prompts:
    raise GenerationsError(
      f"{path}: expected a prompt a line, got no prompt; write at least one."
    )
  return tuple(prompts.values())


def check_unique(prompts: Sequence[Prompt]) -> None:
  """ValueError unless there is at least one prompt and every id occurs once."""
  twice = checks.repeated(prompt.id for prompt in prompts)
  if not prompts or twice:
    raise ValueError(
      f"Expected `prompts` to be at least one prompt with unique ids, got {len(prompts)}"
      f" prompts; ids that occur more than once: {twice[:5]}."
    )
