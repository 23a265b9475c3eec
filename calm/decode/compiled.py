"""The compiled programs that this process keeps. Each holds memory maps (about
250 on a CPU), of which Linux allows a process 65,530; the least recently used
are dropped before XLA fails.
"""

import collections
import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax

# More than a list of prompts has padded sizes (eight lengths by a few numbers
# of rows).
LIMIT = 128
# Part of the memory maps of a process that may be in use before programs are
# dropped.
MAPS_PART = 0.5

# Programs made so far by method, those that are compiled into another's too.
_made: collections.Counter[str] = collections.Counter()
_seconds = 0.0  # of the calls that made them


class Method:
  """Decorates a method of a hashable object, which is static: it is compiled
  once for every object and shape of its arguments.
  """

  def __init__(self, function: Callable[..., Any]):
    @functools.wraps(function)
    # Python runs it only to compile
    def counted(*args: Any, **kwargs: Any) -> Any:
      _made[function.__qualname__] += 1
      return function(*args, **kwargs)

    self._function = counted
    functools.update_wrapper(self, counted)

  def __get__(self, instance: Any, owner: type | None = None) -> Any:
    return self if instance is None else functools.partial(self, instance)

  def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
    global _seconds
    made = num_made()
    before = _seconds
    start = time.perf_counter()
    program, leaves = self._compiled(instance, args, kwargs)
    result = program(*leaves)
    if num_made() > made:  # of methods that it calls the seconds are in its own
      _seconds = before + time.perf_counter() - start
    return result

  def lower(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
    """As `jax.jit(...).lower`, for who reads the compiled program."""
    program, leaves = self._compiled(instance, args, kwargs)
    return program.lower(*leaves)

  def _compiled(
    self, instance: Any, args: Any, kwargs: Any
  ) -> tuple[Any, list[Any]]:
    """The program, and what it is called with."""
    # Taken apart once, 35 microseconds for weights: `jax.jit` would do so
    # again.
    leaves, tree = jax.tree.flatten((args, kwargs))
    shapes = tuple([getattr(leaf, "shape", ()) for leaf in leaves])
    return _program(self._function, instance, tree, shapes), leaves


@functools.lru_cache(LIMIT)
def _program(
  function: Callable[..., Any], instance: Hashable, tree: Any, shapes: Any
) -> Any:
  """The method of one object, jitted by itself for every shape, so that it is
  dropped alone.
  """
  del shapes
  if maps_part() > MAPS_PART:
    _program.cache_clear()

  def call(*leaves: Any) -> Any:
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return function(instance, *args, **kwargs)

  call.__name__ = function.__name__  # that of the program
  return jax.jit(call)


def at_precision(name: str | None) -> contextlib.AbstractContextManager[Any]:
  """Products of float32 matrices that are traced inside have this precision;
  None: JAX's.
  """
  return (
    contextlib.nullcontext()
    if name is None
    else jax.default_matmul_precision(name)
  )


def maps_part() -> float:
  """Memory maps of this process, of those it may have; 0 where the system does
  not tell.
  """
  with contextlib.suppress(OSError, ValueError):
    most = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n") / most
  return 0.0


def seconds() -> float:
  """Seconds that this process has spent on calls that traced and compiled a
  program.
  """
  return _seconds


def num_made(method: str | None = None) -> int:
  """Programs compiled in this process so far, or those of one method,
  'Program.decode'.
  """
  return _made.total() if method is None else _made[method]
