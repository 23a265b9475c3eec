"""Prompts and outputs as lines of JSON."""

import dataclasses
import math
import numbers
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from calm import arguments, storage

# Cached generations that cannot be used; the message names the file and the
# line.
GenerationsError = storage.FormatError


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One prompt; ValueError where `id` or `input` is no text, or targets are no
  texts.
  """

  id: str  # unique name
  input: str  # text, without task prefix
  # accepted references, best first; a lone text is one
  targets: tuple[str, ...] = ()
  # name of the cluster that the prompt belongs to (its source)
  group: str | None = None

  def __post_init__(self):
    targets = self.targets
    group = self.group
    lone = isinstance(targets, str) or not arguments.is_listing(targets)
    texts: tuple[Any, ...] = (targets,) if lone else tuple(targets)
    if not all(isinstance(target, str) for target in texts):
      raise ValueError(
        f"Expected `targets` to be a list of texts, got {targets!r:.100}"
      )
    if not isinstance(group, str | numbers.Integral | None) or isinstance(
      group, bool
    ):
      text = f"to be a text, a whole number or null, got {group!r:.100}"
      raise ValueError(f"Expected `group` {text}")
    group = None if group is None else str(group)
    require_text("id", self.id)
    require_text("input", self.input)
    require_text("targets", "".join(texts))
    require_text("group", group or "")
    object.__setattr__(self, "targets", texts)
    object.__setattr__(self, "group", group)

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values."""
    return {**vars(self), "targets": list(self.targets)}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Prompt":
    """Reads `to_json`'s form, or a data-set row: {id, input, target or
    references, source}.
    """
    field: Any = value.get
    targets = field("targets", field("references", field("target")))
    texts = () if targets is None else targets
    return cls(
      field("id"), field("input"), texts, field("group", field("source"))
    )


@dataclasses.dataclass(frozen=True)
class Record:
  """One output. What foreign files lack is None."""

  id: str  # the prompt's
  prediction: str  # decoded text
  # [length], EOS included, nothing after it
  tokens: tuple[int, ...] | None = None
  # [length] decoder layers run (1-based)
  exit_layers: tuple[int, ...] | None = None
  # [length] at the exit, in [0, 1]
  confidences: tuple[float, ...] | None = None
  # [length] highest confidence that was evaluated and refused at that token, 0
  # if none.
  rejected_confidences: tuple[float, ...] | None = None
  # sum of the emitted tokens' log-probabilities, nats
  score: float | None = None

  def __post_init__(self):
    require_text("id", self.id)
    require_text("prediction", self.prediction)
    lengths = {}
    for name, most in _MOST.items():
      if (values := getattr(self, name)) is not None:
        values = _numbers(name, values, most)
        # `vars` would make a dict of each record
        object.__setattr__(self, name, values)
        lengths[name] = len(values)
    if len(set(lengths.values())) > 1:
      raise ValueError(
        f"Expected the sequences of {self.id!r} to have one length, got "
        f"{lengths}; give each an"
        " entry for every token"
      )
    if (score := self.score) is not None:
      real = isinstance(score, numbers.Real) and not isinstance(score, bool)
      if not real or not math.isfinite(float(score)):
        raise ValueError(
          f"Expected `score` to be a finite number (nats), got {score!r}"
        )
      object.__setattr__(self, "score", float(score))

  def to_json(self) -> dict[str, Any]:
    """The fields that are there, as JSON values."""

    def plain(value):
      return list(value) if isinstance(value, tuple) else value

    return {
      name: plain(value)
      for name, value in vars(self).items()
      if value is not None
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Record":
    """The inverse of `to_json`; unknown fields are ignored, ValueError for what
    is none.
    """
    given: dict[str, Any] = {"id": None, "prediction": None}
    return cls(
      **given | {name: value[name] for name in _NAMES if name in value}
    )


# The greatest value of each sequence; confidences are rounded by as much as
# float32 cosines and softmax margins pass their bounds.
_ROUNDING = 1e-5
_MOST = {
  "tokens": 2**31 - 1,
  "exit_layers": 2**10,
  "confidences": 1,
  "rejected_confidences": 1,
}
_NAMES = ("id", "prediction", *_MOST, "score")


def _numbers(name: str, values: Any, most: int) -> tuple:
  """A field's numbers: confidences in [0, 1], or whole numbers up to `most`."""
  kinds, slack = ((int, float), _ROUNDING) if most == 1 else ((int,), 0)

  def holds(value):
    return type(value) in kinds and -slack <= value <= most + slack

  odd = values
  if not isinstance(values, str) and arguments.is_listing(values):
    found = list(values)
    if not set(map(type, found)) <= {int, float}:  # numpy's scalars
      found = list(map(_plain, found))
    # A million records are read: their numbers are looked at together; a NaN is
    # in the sum.
    total = sum(found) if set(map(type, found)) <= set(kinds) else math.nan
    if not found or (
      total == total and holds(min(found)) and holds(max(found))
    ):
      return tuple(map(float, found)) if most == 1 else tuple(found)
    odd = next(value for value in found if not holds(value))
  kind = "numbers in [0, 1]" if most == 1 else f"whole numbers in 0 ... {most}"
  raise ValueError(f"Expected `{name}` to be a list of {kind}, got {odd!r}")


def _plain(value: Any) -> Any:
  """A float32 keeps its short digits: 0.9, not 0.89999998."""
  if isinstance(value, np.floating):
    return float(str(value))
  return int(value) if isinstance(value, np.integer) else value


def require_text(name: str, text: Any) -> None:
  """ValueError for what is no text, or none that a file in UTF-8 can hold."""
  if not isinstance(text, str):
    raise ValueError(f"Expected `{name}` to be a text, got {text!r:.100}")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    # JSON can hold it, and no file in UTF-8 can
    half = f"{text[error.start]!r} at character {error.start + 1}"
    raise ValueError(
      f"Expected `{name}` to be Unicode, got half of a surrogate pair, {half}"
    ) from None


def read_each(
  path: str | pathlib.Path,
  parse: Callable[[storage.Line], Any],
  what: str,
  *,
  pipes: bool = False,
) -> Iterator[tuple[storage.Line, Any]]:
  """(line, what `parse` makes of it, with an `id`) of each object of a JSON
  Lines file.

  GenerationsError, which names file and line, where one is not `what`, or an id
  occurs twice.
  """
  seen: set[str] = set()
  for line in storage.read_lines(path, pipes=pipes):
    try:
      value = parse(line)
    except GenerationsError:
      raise
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
      text = (
        f"expected {what}, got none: {str(error).rstrip('.')}; write the "
        "line again."
      )
      raise line.error(text) from error
    if value.id in seen:
      raise line.error(
        f"expected every id once, got {value.id!r} twice; give each its own, "
        "or resume the run"
        " that wrote it."
      )
    seen.add(value.id)
    yield line, value


def read_prompts(path: str | pathlib.Path) -> tuple[Prompt, ...]:
  """Reads prompts from JSON Lines of {id, input, targets or target, group or
  source}.

  Raises:
    GenerationsError: a line is no prompt, an id occurs twice, or there is no
      prompt at all.
  """

  def parse(line):
    return Prompt.from_json(line.value)

  prompts = tuple(
    prompt for _, prompt in read_each(path, parse, "a prompt, `id` and `input`")
  )
  if not prompts:
    raise GenerationsError(
      f"{path}: expected a prompt a line, got none; write at least one."
    )
  return prompts
