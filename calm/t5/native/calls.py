"""How XLA is given functions that LLVM compiles, and how many calls share the work."""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any

import jax

from calm.t5 import platforms

# XLA:CPU runs up to nine operations that are ready one after another; more, side by side.
PIECES = 12
# What XLA was given; it calls them for as long as the process lives.
_GIVEN: dict[str, Any] = {}
_lock = threading.Lock()


def available() -> bool:
  """Whether XLA can be given functions that LLVM compiles."""
  return platforms.runs_in_this_process() and _has_llvmlite()


def pieces(worth: bool = True) -> int:
  """Calls that a function is divided into: several where it is worth that XLA's threads share
  them, and XLA has more than one."""
  return PIECES if worth and _num_cores() > 1 else 1


def target(name: str, make: Callable[[], Any]) -> str:
  """The name by which XLA calls a function.

  Args:
    name: of the function, and of its sizes.
    make: compiles it; called once in a process.
  """
  with _lock:
    if name not in _GIVEN:
      function = make()
      jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function.ctypes), platform="cpu")
      _GIVEN[name] = function
  return name


def ends(count: int, parts: int) -> list[int]:
  """Where so many parts of equal ones end, from 0 on: none is empty, so there may be fewer."""
  parts = min(parts, count)
  return [i * count // parts for i in range(parts + 1)]


def threads() -> int:
  """Threads that a call may share its work among."""
  return _num_cores()


def _num_cores() -> int:
  """Cores that this process may use, as XLA counts them."""
  allowed = getattr(os, "sched_getaffinity", None)  # Linux only
  return len(allowed(0)) if allowed else os.cpu_count() or 1


@functools.cache
def _has_llvmlite() -> bool:
  return importlib.util.find_spec("llvmlite") is not None
