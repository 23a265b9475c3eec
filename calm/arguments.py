"""Arguments of public functions, compared with their annotations where a caller
gives them.

    @arguments.checked(engine=engines.by_name)
    def decode(sizes: Sequence[int], engine: Engine | None = None, share: float
    = 1.0): ...

numpy's scalars pass for numbers, texts for paths, any ordered iterable for a
sequence, and a name for an object where a function is given that looks it up. A
ValueError names the argument that is anything else.
"""

import functools
import importlib
import inspect
import numbers
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Target = typing.TypeVar("Target", bound=Callable[..., Any])

# Annotation: one of it in words, several of it, and the class of values that
# pass.
_PLAIN: Mapping[Any, tuple[str, str, type]] = {
  bool: ("True or False", "True or False", bool),
  int: ("a whole number", "whole numbers", numbers.Integral),
  float: ("a number", "numbers", numbers.Real),
  str: ("a text", "texts", str),
  type(None): ("None", "None", type(None)),
}
_UNORDERED = (bytes, bytearray, Mapping, set, frozenset, type)
_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)


class _Mismatch(Exception):
  """A value that an annotation does not allow; the message names an item of a
  list.
  """


def checked(**by_name: Callable[[str], Any]) -> Callable[[Target], Target]:
  """A decorator of functions and dataclasses that compares arguments with
  annotations.

  Annotations that it does not know (arrays, `Any`, `Iterable`) allow
  everything. `by_name` maps an argument to a function that finds the object of
  a name.
  """

  def decorate(target: Any) -> Any:
    if isinstance(target, type):
      target.__init__ = decorate(target.__init__)
      # Another checker of annotations would see the arguments before they are
      # converted.
      target.__no_type_check__ = True  # pyright: ignore[reportAttributeAccessIssue]
      return target
    names = [*inspect.signature(target).parameters]
    kinds = functools.cache(functools.partial(typing.get_type_hints, target))

    def convert(name: str, value: Any) -> Any:
      if isinstance(value, str) and name in by_name:
        return by_name[name](value)
      kind = kinds().get(name, Any)
      try:
        return _converted(value, kind)
      except _Mismatch as error:
        raise ValueError(
          f"Expected `{name}` to be {_words(kind)}, got "
          f"{str(error) or _shown(value)}."
        ) from None

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
      placed = [convert(*pair) for pair in zip(names, args, strict=False)]
      named = {name: convert(name, value) for name, value in kwargs.items()}
      return target(*placed, *args[len(placed) :], **named)

    return call

  return decorate


def _converted(value: Any, kind: Any) -> Any:
  """A value in the form of its annotation; _Mismatch where the annotation does
  not allow it.
  """
  origin = typing.get_origin(kind)
  inner = typing.get_args(kind)
  if _is_open(kind):
    return value
  if kind in _PLAIN:
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or of JAX
      value = value.item()
    _require(
      isinstance(value, _PLAIN[kind][2])
      and (kind is bool or not isinstance(value, bool))
    )
    return (
      kind(value)
      if kind in (int, float) and type(value) not in (int, float)
      else value
    )
  if origin in _UNIONS:
    return _one_of(value, inner)
  if origin in _SEQUENCES:
    _require(is_listing(value) and not isinstance(value, str))
    items = value if isinstance(value, list | tuple) else tuple(value)
    if (
      inner
      and inner[0] is not Any
      and not all(type(item) is inner[0] for item in items)
    ):
      items = [_item(place, item, inner[0]) for place, item in enumerate(items)]
    return tuple(items) if origin is tuple else items
  if kind is pathlib.Path and isinstance(value, str):
    return pathlib.Path(value)
  if origin in _MAPPINGS:
    _require(isinstance(value, Mapping))
    return (
      value
      if inner[1] is Any
      else {k: _item(k, v, inner[1]) for k, v in value.items()}
    )
  if origin is typing.Literal:
    _require(type(value) in map(type, inner) and value in inner)
  elif origin is Callable:
    _require(callable(value))
  elif isinstance(kind, type):
    _require(isinstance(value, kind) and not isinstance(value, type))
  return value


def _is_open(kind: Any) -> bool:
  """Whether anything passes: an array is checked by the function that reads
  it.
  """
  return kind is Any or getattr(kind, "__module__", "").startswith("numpy")


def _one_of(value: Any, kinds: Sequence[Any]) -> Any:
  if any(map(_is_open, kinds)):
    return value
  within = _Mismatch()
  for kind in kinds:
    try:
      return _converted(value, kind)
    except _Mismatch as error:
      within = error if str(error) else within
  raise within


def one_of(name: str, value: Any, known: Iterable[str]) -> Any:
  """The value of an argument; ValueError names the choices where it is none of
  them.
  """
  if value not in known:
    raise ValueError(
      f"Expected `{name}` to be one of {sorted(known)}, got {value!r:.100}."
    )
  return value


def is_listing(value: Any) -> bool:
  """Whether a value lists others in an order: a sequence, a generator, an
  array, a text.
  """
  ordered = isinstance(value, Iterable) and not isinstance(value, _UNORDERED)
  return (
    ordered and getattr(value, "ndim", 1) > 0 and not hasattr(value, "columns")
  )


def is_table(value: Any) -> bool:
  """Whether a value is a table with named columns, as of pandas and polars."""
  return hasattr(value, "columns") and hasattr(value, "__getitem__")


def _item(place: Any, value: Any, kind: Any) -> Any:
  try:
    return _converted(value, kind)
  except _Mismatch as error:
    raise _Mismatch(f"{str(error) or _shown(value)} at {place!r}") from None


def _require(holds: bool) -> None:
  if not holds:
    raise _Mismatch


def _words(kind: Any, several: bool = False) -> str:
  """An annotation in words."""
  origin = typing.get_origin(kind)
  inner = typing.get_args(kind)
  if kind in _PLAIN:
    one, more, _ = _PLAIN[kind]
    return more if several else one
  if kind is Any:
    return "values"
  if origin in _UNIONS:
    return " or ".join(_words(one, several) for one in inner)
  if origin in _SEQUENCES:
    return (
      f"{'lists' if several else 'a list'} of {_words(inner[0], several=True)}"
    )
  if origin is typing.Literal:
    return f"one of {', '.join(map(repr, inner))}"
  if origin in _MAPPINGS:
    return f"a mapping to {_words(inner[1])}"
  if origin is Callable:
    return "a function"
  return f"{'' if several else 'a '}`{kind.__name__}`"


def _shown(value: Any) -> str:
  if isinstance(value, type):
    return f"the class {value.__name__}"
  return f"{value!r:.60} ({type(value).__name__})"


def package(name: str, wanted: str, install: str) -> Any:
  """A package that only some users need; ImportError says how to install it."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    message = (
      f"Expected the package {name} to {wanted}, got none; `pip install "
      f"{install}`."
    )
    raise ImportError(message) from error
