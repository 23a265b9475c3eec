"""Prompts and outputs as lines of JSON, with errors that name the file and the line."""

import dataclasses
import json
import math
import numbers
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from calm.calibrate import arguments, signals
from calm.calibrate.generations import files


class GenerationsError(ValueError):
  """Cached generations that cannot be used; the message names the file and the line."""


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
    for name, (kind, check) in _SEQUENCES.items():
      values = getattr(self, name)
      if values is not None:
        if isinstance(values, str) or not arguments.is_listing(values):
          raise ValueError(f"Expected `{name}` to be a list of {kind}, got {values!r}")
        try:
          values = tuple(check(value) for value in values)
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
      object.__setattr__(self, "score", _score(self.score))

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


def _whole(most: int) -> Callable[[Any], int]:
  """A check of whole numbers from 0 to `most`."""

  def check(value: Any) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 0 <= int(value) <= most:
      raise ValueError(repr(value))
    return int(value)

  return check


def _confidence(value: Any) -> float:
  """As written: a numpy float32 keeps its short digits (0.9, not 0.89999998)."""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(repr(value))
  number = float(str(value)) if hasattr(value, "dtype") else float(value)
  if not -_ROUNDING <= number <= 1 + _ROUNDING:  # NaN and infinities too
    raise ValueError(repr(value))
  return number


def _score(value: Any) -> float:
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not -math.inf < float(value) < math.inf:
    raise ValueError(f"Expected `score` to be a finite number (nats), got {value!r}")
  return float(value)


# Float32 cosines and softmax margins pass their bounds by so much.
_ROUNDING = 1e-5
LONGEST_LINE = 2**26
_RESUME = "the last line is cut off: resume the run that wrote it"
# Field: what each of its values is, and a check that raises ValueError with what was got.
_SEQUENCES = {
  "tokens": (f"whole numbers in 0 ... {2**31 - 1}", _whole(2**31 - 1)),
  "exit_layers": (f"whole numbers in 0 ... {2**10}", _whole(2**10)),
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


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a file that holds a JSON object; `offset` is where it begins, in bytes."""

  path: pathlib.Path
  number: int
  value: dict[str, Any]
  offset: int = 0

  def error(self, message: str) -> GenerationsError:
    """An error that names this line."""
    return GenerationsError(f"{self.path}:{self.number}: {message}")


def read_lines(path: str | pathlib.Path, *, pipes: bool = False) -> Iterator[Line]:
  """Reads a JSON Lines file of objects; blank lines are skipped.

  Args:
    path: the file.
    pipes: whether it may be a pipe or a device, whose lines are waited for.

  Raises:
    GenerationsError: the file is missing or unreadable, a line is no UTF-8 or no JSON object,
      or the last line is cut off.
  """
  path = pathlib.Path(path)
  offset = following = 0
  try:
    with open(path, "rb") if pipes else files.opened(path) as file:
      for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
        signals.check()
        if len(line) > LONGEST_LINE:
          raise GenerationsError(
            f"{path}:{number}: expected lines of at most {LONGEST_LINE} bytes, got a longer"
            " one; restore the file, or generate again."
          )
        offset, following = following, following + len(line)
        raw = line.removesuffix(b"\n")
        if not raw.strip():
          continue
        value, problem = parse_line(raw)
        if value is None:
          cut_off = not line.endswith(b"\n")
          way_out = _RESUME if cut_off else "write the line again"
          raise GenerationsError(
            f"{path}:{number}: expected a JSON object, got {problem}; {way_out}."
          )
        yield Line(path, number, value, offset)
  except OSError as error:
    raise GenerationsError(
      f"{path}: expected a file that can be read, got: {error.strerror}; check its path and"
      " rights."
    ) from error


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, str]:
  """One line as (JSON object, ''), or (None, what it is instead)."""
  try:
    value = files.parse_json(raw)
  except UnicodeDecodeError as error:
    return None, f"invalid UTF-8 at byte {error.start}"
  except ValueError as error:
    return None, f"{raw[:60].decode('utf-8', 'replace')!r} ({error})"
  return (value, "") if isinstance(value, dict) else (None, type(value).__name__)


def dump_line(value: Mapping[str, Any]) -> str:
  """One JSON Lines line, its newline included."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def read_prompts(path: str | pathlib.Path) -> tuple[Prompt, ...]:
  """Reads prompts from JSON Lines of {id, input, targets or target, group or source}.

  Raises:
    GenerationsError: a line is no prompt, an id occurs twice, or there is no prompt at all.
  """
  prompts: dict[str, Prompt] = {}
  for line in read_lines(path):
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


def check_unique(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
  """Prompts by id.

  Raises:
    ValueError: there is no prompt, or an id occurs twice.
  """
  by_id = {prompt.id: prompt for prompt in prompts}
  if not prompts or len(by_id) != len(prompts):
    seen: set[str] = set()
    twice = sorted({p.id for p in prompts if p.id in seen or seen.add(p.id)})
    raise ValueError(
      f"Expected `prompts` to be at least one prompt with unique ids, got {len(prompts)}"
      " prompts;"
      f" ids that occur more than once: {twice[:5]}."
    )
  return by_id


def drop_partial_line(path: pathlib.Path) -> str | None:
  """Repairs the end of a file whose writer was killed; returns what was done, if anything."""
  with open(path, "rb") as file:
    size = file.seek(0, 2)
    file.seek(max(0, size - LONGEST_LINE - 1))
    last = file.read()
    last = last[last.rfind(b"\n") + 1 :]
    if not last or len(last) > LONGEST_LINE:  # none, or no line, which `read_lines` names
      return None
    start = size - len(last)
    file.seek(0)
    pieces = iter(lambda: file.read(2**20), b"")
    number = 1 + sum(piece.count(b"\n") for piece in pieces)
  if parse_line(last)[0] is not None:
    files.append(path, b"\n")
    return None
  with open(path, "r+b") as file:
    file.truncate(start)
  return f"{path}:{number}: the last line was cut off and has been dropped ({len(last)} bytes)."
