"""What XLA hands to a custom call, read by functions that numba compiles.

XLA calls a function with one `XLA_FFI_CallFrame` (xla/ffi/api/c_api.h of its foreign function
interface, whose layout a major version keeps). Every field that is read here is a word of 64
bits, or lies in one, so that a frame is an array of words, and so is what it points to.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

# Of the interface that this was written by; XLA refuses it where it can no longer serve it.
MAJOR, MINOR = 0, 3

# Words of a frame, `XLA_FFI_CallFrame`: of what is asked besides a call, and of its arrays.
_FRAME_WORDS, _EXTENSION, _NUM_ARGUMENTS, _ARGUMENTS, _RESULTS = 15, 1, 7, 9, 14
# Words of an array, `XLA_FFI_Buffer`.
_BUFFER_WORDS, _DATA, _RANK, _SIZES = 6, 3, 4, 5
# Words of `XLA_FFI_Metadata_Extension`, and of the `XLA_FFI_Metadata` that it asks for.
_METADATA, _VERSION, _TRAITS = 3, 3, 4


def _at(typing: Any, address: Any) -> Any:
  """The pointer to an address."""
  del typing, address

  def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    del context, signature
    return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

  return types.voidptr(types.int64), generate


_pointer: Any = intrinsic(_at)


@njit(inline="always")
def words(address: Any, count: Any) -> Any:
  """So many words from an address on."""
  return carray(_pointer(address), (count,), np.int64)


@njit(inline="always")
def num_arguments(frame: Any) -> Any:
  """Arrays that a call is given."""
  return frame[_NUM_ARGUMENTS]


@njit(inline="always")
def argument(frame: Any, i: Any) -> Any:
  """The words that describe the `i`th array that a call is given."""
  return words(words(frame[_ARGUMENTS], i + 1)[i], _BUFFER_WORDS)


@njit(inline="always")
def result(frame: Any, i: Any) -> Any:
  """The words that describe the `i`th array that a call fills."""
  return words(words(frame[_RESULTS], i + 1)[i], _BUFFER_WORDS)


@njit(inline="always")
def size(buffer: Any, axis: Any) -> Any:
  """Numbers along an axis."""
  return words(buffer[_SIZES], buffer[_RANK])[axis]


@njit(inline="always")
def integers(buffer: Any, shape: Any) -> Any:
  """An array of int32; sizes that are known when this is compiled stay known."""
  return carray(_pointer(buffer[_DATA]), shape, np.int32)


@njit(inline="always")
def floats(buffer: Any, shape: Any) -> Any:
  """An array of float32, likewise."""
  return carray(_pointer(buffer[_DATA]), shape, np.float32)


@njit(inline="always")
def _describe(frame: Any) -> None:
  """Answers XLA, which asks before the first call, by what version a function was made."""
  metadata = words(words(frame[_EXTENSION], _METADATA + 1)[_METADATA], _TRAITS + 1)
  metadata[_VERSION] = MAJOR | MINOR << 32
  metadata[_TRAITS] = 0


def handler(body: Callable[[Any], None]) -> Any:
  """A C function that XLA can call, of a compiled function of a frame."""

  def called(address: Any) -> Any:
    frame = carray(address, (_FRAME_WORDS,))
    if frame[_EXTENSION] != 0:
      _describe(frame)
    else:
      body(frame)
    return 0  # no error

  return cfunc(types.int64(types.CPointer(types.int64)))(called)
