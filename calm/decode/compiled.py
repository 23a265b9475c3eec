"""The compiled programs that this process keeps. Each holds memory maps (about 250 on a CPU),
of which Linux allows a process 65,530; the least recently used are dropped before XLA fails."""

import collections
import contextlib
import functools
import pathlib
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax

# More than a list of prompts has padded sizes (eight lengths by a few numbers of rows).
LIMIT = 128
# Part of the memory maps of a process that may be in use before programs are dropped.
MAPS_PART = 0.5

# Programs made so far by method; a method that is compiled into another's does not count.
_made: collections.Counter[str] = collections.Counter()
_tracing = threading.local()
_kept: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
_lock = threading.Lock()


class Method:
  """Decorates a method of a hashable object, which is static: it is compiled once for every
  object and shape of its arguments."""

  def __init__(self, function: Callable[..., Any]):
    self._function = _counted(function)
    functools.update_wrapper(self, self._function)

  def __get__(self, instance: Any, owner: type | None = None) -> Any:
    return self if instance is None else functools.partial(self, instance)

  def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
    return self._compiled(instance, args, kwargs)(*args, **kwargs)

  def lower(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
    """As `jax.jit(...).lower`, for who reads the compiled program."""
    return self._compiled(instance, args, kwargs).lower(*args, **kwargs)

  def _compiled(self, instance: Any, args: Any, kwargs: Any) -> Any:
    shapes = tuple(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves((args, kwargs)))
    key = (self._function.__qualname__, instance, shapes)
    with _lock:
      made = _kept.get(key)
      if made is None:
        _make_room()
        made = jax.jit(functools.partial(self._function, instance))
        _kept[key] = made
      _kept.move_to_end(key)
    return made


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, which Python runs only to compile it: once a program."""

  @functools.wraps(function)  # its signature too, which `jax.jit` looks arguments up in
  def traced(*args: Any, **kwargs: Any) -> Any:
    if getattr(_tracing, "within", False):
      return function(*args, **kwargs)
    _made[function.__qualname__] += 1
    _tracing.within = True
    try:
      return function(*args, **kwargs)
    finally:
      _tracing.within = False

  return traced


def at_precision(name: str | None) -> contextlib.AbstractContextManager[Any]:
  """Products of float32 matrices that are traced inside have this precision; None: JAX's."""
  return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)


def _make_room() -> None:
  """Drops the programs that were not used for longest, so that another one fits."""
  drop = lambda: _kept.popitem(last=False)[1].clear_cache()
  while len(_kept) >= LIMIT:
    drop()
  while len(_kept) > 1 and maps_part() > MAPS_PART:
    for _ in range(1 + len(_kept) // 4):
      drop()


def maps_part() -> float:
  """Memory maps of this process, of those it may have; 0 where the system does not tell."""
  with contextlib.suppress(OSError, ValueError):
    most = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n") / most
  return 0.0


def num_made(method: str | None = None) -> int:
  """Programs compiled in this process so far, or those of one method, 'Program.decode'."""
  return _made.total() if method is None else _made[method]
