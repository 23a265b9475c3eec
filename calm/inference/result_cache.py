"""Results as JSON files, whose names hold a digest of everything that they depend on.

A result is a dataclass of numbers, texts, tuples and other such dataclasses.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from calm import storage
from calm.calibrate import Prompt

# Raised whenever an experiment's numbers change their meaning: older files are not read again.
VERSION = 1

T = TypeVar("T")


def to_json(value: Any) -> Any:
  """A result as JSON values; NaN is null and infinity (never exit) is "never"."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {str(key): to_json(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(entry) for entry in value]
  if isinstance(value, float):
    return None if math.isnan(value) else "never" if value == math.inf else value
  if value is None or isinstance(value, bool | int | str):
    return value
  raise TypeError(f"Expected numbers, texts, tuples and dataclasses, got {value!r}.")


def from_json(kind: Any, value: Any) -> Any:
  """The inverse of `to_json` for a result of the annotated type `kind`; TypeError for a field
  that is missing or of another type. Fields of an earlier version are passed over."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    some = next(each for each in inner if each is not type(None))
    return None if value is None and type(None) in inner else from_json(some, value)
  if origin is tuple and type(value) in (list, tuple):
    kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
    return tuple(from_json(each, entry) for each, entry in zip(kinds, value, strict=True))
  if dataclasses.is_dataclass(kind):
    hints, make = typing.get_type_hints(kind.__init__), typing.cast(Callable[..., Any], kind)
    return make(**{n: from_json(hints[n], entry) for n, entry in value.items() if n in hints})
  if kind is float and (value is None or value == "never"):
    return math.nan if value is None else math.inf
  if type(value) is kind or (kind is float and type(value) is int):
    return kind(value)
  raise TypeError(f"Expected {kind} in a stored result, got {value!r}; measure again.")


def digest(value: Any) -> str:
  """SHA-256 (hexadecimal, 16 digits) of JSON values; the same anywhere."""
  text = json.dumps(to_json(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
  return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
  """Digest of prompts with their references, in order."""
  return digest([prompt.to_json() for prompt in prompts])


def cached(
  folder: pathlib.Path,
  kind: type[T],
  name: str,
  key: Mapping[str, Any],
  make: Callable[[], T],
) -> T:
  """The result `name`, of type `kind`, that `folder` has, or what `make` computes, stored;
  `key` holds all JSON values that it depends on. ValueError: a damaged file."""
  path = folder / f"{name}-{digest({'experiment': name, 'version': VERSION, **key})}.json"
  if path.exists():
    try:
      return from_json(kind, storage.parse_json(storage.content(path))["result"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f"Expected a stored result of {name} in {path}, got something else ({error}); delete"
        " the file to have it computed again."
      ) from error
  result = to_json(make())
  folder.mkdir(parents=True, exist_ok=True)
  stored = {"experiment": name, "key": to_json(dict(key)), "result": result}
  storage.write_atomically(path, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
  # As it will be read again, so that the first run and the second one draw the same.
  return from_json(kind, result)
