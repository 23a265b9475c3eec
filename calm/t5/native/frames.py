"""What XLA hands to a custom call, and functions that it can call.

XLA calls a function with one `XLA_FFI_CallFrame` (xla/ffi/api/c_api.h of its foreign function
interface, whose layout a major version keeps). Every field that is read here is a word of 64
bits, or lies in one, so that a frame is an array of words, and so is what it points to.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from calm.t5.native.instructions import INDEX, Writer, number

# Of the interface that this was written by; XLA refuses it where it can no longer serve it.
MAJOR, MINOR = 0, 3

# Words of a frame, `XLA_FFI_CallFrame`: of what is asked besides a call, and of its arrays.
_EXTENSION, _ARGUMENTS, _RESULTS = 1, 9, 14
# Words of an array, `XLA_FFI_Buffer`.
_DATA, _SIZES = 3, 5
# Words of `XLA_FFI_Metadata_Extension`, and of the `XLA_FFI_Metadata` that it asks for.
_METADATA, _VERSION, _TRAITS = 3, 3, 4


class Frame:
  """What XLA hands to a call.

  Attributes:
    address: where it is.
  """

  def __init__(self, writer: Writer, address: Any):
    self._w, self.address = writer, address

  def argument(self, i: int) -> Any:
    """The address of what describes the `i`th array that a call is given."""
    return self._w.word(self._w.word(self.address, _ARGUMENTS), i)

  def result(self, i: int) -> Any:
    """The same of the `i`th array that it fills."""
    return self._w.word(self._w.word(self.address, _RESULTS), i)

  def numbers(self, array: Any) -> Any:
    """The address of an array's numbers."""
    return self._w.word(array, _DATA)

  def size(self, array: Any, axis: int) -> Any:
    """Numbers along an axis."""
    return self._w.word(self._w.word(array, _SIZES), axis)


def handler(name: str, write: Callable[[Writer, Frame], None]) -> "Compiled":
  """A C function that XLA can call.

  Args:
    name: of the function.
    write: writes what it does with a call's arrays.
  """
  module = ir.Module()
  module.triple = llvm.get_process_triple()
  function = ir.Function(module, ir.FunctionType(INDEX, [INDEX]), name)
  begin, asked, called, end = map(
    function.append_basic_block, ("begin", "asked", "called", "end")
  )
  w = Writer(ir.IRBuilder(begin), module)
  frame = Frame(w, function.args[0])
  asks = w.word(frame.address, _EXTENSION)
  w.b.cbranch(w.b.icmp_signed("!=", asks, number(0)), asked, called)
  w.b.position_at_end(asked)
  metadata = w.word(asks, _METADATA)
  w.set_word(metadata, _VERSION, MAJOR | MINOR << 32)
  w.set_word(metadata, _TRAITS, 0)
  w.b.branch(end)
  w.b.position_at_end(called)
  write(w, frame)
  w.b.branch(end)
  w.b.position_at_end(end)
  w.b.ret(number(0))  # no error
  return Compiled(str(module), name)


class Compiled:
  """Machine code of this process, for as long as this lives.

  Attributes:
    ctypes: the function.
  """

  def __init__(self, text: str, name: str):
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.verify()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
      cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    self._engine = llvm.create_mcjit_compiler(module, machine)
    self._engine.finalize_object()
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    self.ctypes = kind(self._engine.get_function_address(name))
