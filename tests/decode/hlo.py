"""Reads compiled HLO: which operations run inside loops, and how large their
results are.
"""

import dataclasses
import re

import numpy as np

# No computation of their own, or in place by definition of the loop.
FREE = {"parameter", "get-tuple-element", "tuple", "while", "conditional"}
FREE |= {"bitcast", "constant"}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One instruction."""

  opcode: str  # `copy`, `fusion`, ...
  elements: int  # numbers in its result; 0 for tuples
  calls: tuple[str, ...]  # computations that it runs
  is_root: bool  # whether it is its computation's result
  text: str  # the line


def computations(text: str) -> dict[str, list[Operation]]:
  """Instructions of every computation of a module's text."""
  out: dict[str, list[Operation]] = {}
  name = ""
  for line in text.splitlines():
    header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header:
      name = header[1]
      out[name] = []
    found = re.match(
      r"\s+(ROOT )?%?[\w.\-]+ = (\(.*?\) |\S+ )([\w\-]+)\(", line
    )
    if found:
      shape = re.match(r"\w+\[([\d,]*)\]", found[2])
      sizes = [int(x) for x in shape[1].split(",") if x] if shape else [0]
      listed = (
        r"(?:calls|body|condition|to_apply|true_computation|false_computation)"
        r"=%?([\w.\-]+)"
      )
      calls = re.findall(listed, line)
      for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        calls += re.findall(r"%?([\w.\-]+)", group)
      operation = Operation(
        found[3], int(np.prod(sizes)), tuple(calls), bool(found[1]), line
      )
      out[name].append(operation)
  return out


def in_loops(text: str) -> list[Operation]:
  """Instructions that run in the body of some `while`, those inside fusions
  left out.
  """
  module = computations(text)
  todo = [
    call
    for operations in module.values()
    for operation in operations
    if operation.opcode == "while"
    for call in operation.calls
  ]
  seen: set[str] = set()
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    for operation in module[name]:
      if operation.opcode in ("while", "conditional", "call"):
        todo += operation.calls
  return [operation for name in sorted(seen) for operation in module[name]]


def large(text: str, elements: int) -> list[Operation]:
  """Operations in loops that make `elements` numbers or more; updates in place
  are none.
  """
  module = computations(text)

  def in_place(operation: Operation) -> bool:
    if operation.opcode != "fusion":
      return operation.opcode in FREE | {"dynamic-update-slice"}
    (root,) = (inner for inner in module[operation.calls[0]] if inner.is_root)
    # A reshape of the updated buffer moves nothing.
    opcodes = {inner.opcode for inner in module[operation.calls[0]]}
    return root.opcode == "dynamic-update-slice" or (
      root.opcode == "bitcast" and "dynamic-update-slice" in opcodes
    )

  return [
    x for x in in_loops(text) if x.elements >= elements and not in_place(x)
  ]


def most_ready(text: str) -> int:
  """Most operations of one turn of a loop that have their inputs at the same
  time.

  As XLA:CPU takes them, first come, first served, if buffers set no other
  order.
  """
  module = computations(text)
  bodies = {
    name for operations in module.values() for name in _bodies(operations)
  }
  return max(_most_ready(module[name]) for name in bodies)


def _bodies(operations: list[Operation]) -> list[str]:
  """Of the loops among them."""
  return [
    operation.calls[
      1 if "condition=" in operation.text.split("body=")[0] else 0
    ]
    for operation in operations
    if operation.opcode == "while"
  ]


def turns(text: str) -> list[int]:
  """Operations of a turn of every loop that multiplies matrices, with those of
  the longest loop within it.
  """
  module = computations(text)

  def size(name):
    return sum(each.opcode not in FREE for each in module[name])

  bodies = {
    name for operations in module.values() for name in _bodies(operations)
  }

  def product(each):
    return each.opcode == "dot" or "calm_tiles" in each.text

  multiply = [name for name in bodies if any(map(product, module[name]))]
  return [
    size(name) + max(map(size, _bodies(module[name])), default=0)
    for name in multiply
  ]


def _most_ready(operations: list[Operation]) -> int:
  """The same of one computation."""
  needs: dict[str, set[str]] = {}
  free: dict[str, set[str]] = {}
  for operation in operations:
    name, inputs = re.match(
      r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", operation.text
    ).groups()
    inputs = inputs.split(f" {operation.opcode}(", 1)[1].split("), ", 1)[0]
    names = set(re.findall(r"%([\w.\-]+)", inputs))
    known = {each for other in names for each in free.get(other, {other})}
    is_free = operation.opcode in FREE - {"while", "conditional"}
    (free if is_free else needs)[name] = known
  ready = [name for name, inputs in needs.items() if not inputs]
  most = 0
  done: set[str] = set(ready)
  finished: set[str] = set()
  while ready:
    most = max(most, len(ready))
    finished.add(ready.pop(0))
    new = [
      name for name in needs if name not in done and needs[name] <= finished
    ]
    ready += new
    done |= set(new)
  assert len(finished) == len(needs)
  return most
