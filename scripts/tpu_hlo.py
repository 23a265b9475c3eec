"""Reads what XLA compiled for a TPU: the token loop, its estimated cycles, what
it moves.

XLA:TPU notes how many cycles it expects beside most instructions. Of control
flow it expects nothing, so the cycles are added up along the path that a forced
exit takes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# What moves numbers and makes none.
MOVES = {"copy", "copy-start", "transpose", "reverse"}
COLLECTIVES = (
  *(
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
  ),
  *("all-gather-start", "all-reduce-start", "collective-permute-start"),
)
WIDTHS = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}  # bytes
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str  # without the percent sign
  opcode: str
  shape: str  # of its result, layout included, as it is written
  cycles: int  # the compiler's estimate; 0 where it gives none
  calls: Mapping[str, str]  # what it runs, by role
  # a conditional's computations by the value that picks them
  branches: list[str]
  text: str  # the line

  @property
  def elements(self) -> int:
    """Numbers in the result, of the largest part where it is a tuple."""
    sizes = re.findall(r"\b[a-z]\w*\[([\d,]*)\]", self.shape)
    return max(map(_product, sizes), default=0)


def _product(dimensions: str) -> int:
  return math.prod(int(size) for size in dimensions.split(",") if size)


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled module: instructions in the order of their schedule, by
  computation.
  """

  computations: Mapping[str, list[Instruction]]
  entry: str

  def within(self, name: str) -> Iterator[Instruction]:
    """Every instruction of a computation and of those that its control flow
    runs.
    """
    for instruction in self.computations[name]:
      yield instruction
      if instruction.opcode in ("while", "conditional", "call"):
        for called in (*instruction.calls.values(), *instruction.branches):
          yield from self.within(called)

  def token_while(self) -> Instruction:
    """The loop over tokens: the longest loop that the entry runs."""
    loops = [x for x in self.computations[self.entry] if x.opcode == "while"]
    if not loops:
      raise ValueError(
        "Expected a loop over tokens, got none; compile a whole decoding."
      )
    return max(
      loops, key=lambda x: sum(1 for _ in self.within(x.calls["body"]))
    )

  def token_loop(self) -> str:
    """Its body."""
    return self.token_while().calls["body"]

  def carried(self) -> dict[str, int]:
    """Bytes of what the loop over tokens carries, by type and dimensions
    ('bf16[8,512]').
    """
    found: collections.Counter[str] = collections.Counter()
    array = rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]"
    for dtype, dimensions in re.findall(array, self.token_while().shape):
      found[f"{dtype}[{dimensions}]"] += _product(dimensions) * WIDTHS[dtype]
    return dict(found)


@dataclasses.dataclass(frozen=True)
class Path:
  """How an engine's control flow shows that one more segment of layers is
  run.
  """

  deeper: int = 0  # branch of a conditional that runs it
  leaves: int = 0  # branch of a conditional that does not
  # whether segments are loops of at most one turn instead
  by_loops: bool = False
  # whether a conditional runs the first segment as well
  first_too: bool = False


def parse(text: str) -> Module:
  """A module from `compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  entry = ""
  name = ""
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header:
      name = header[2]
      computations[name] = []
      entry = name if header[1] else entry
    elif name and (instruction := _instruction(line)):
      computations[name].append(instruction)
  if not entry:
    raise ValueError(
      "Expected a whole module, got one without an entry; give `as_text()`."
    )
  return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
  found = re.match(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line
  )
  if not found:
    return None
  calls = dict(_CALLED.findall(line))
  branches = []
  if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
    branches = re.findall(r"%?([\w.\-]+)", listed[1])
  elif found[3] == "conditional":
    branches = [calls.pop("false_computation"), calls.pop("true_computation")]
  cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
  estimate = int(cycles[1]) if cycles else 0
  return Instruction(
    found[1], found[3], found[2], estimate, calls, branches, line
  )


def step_cycles(module: Module, path: Path, segments: int = 1) -> int:
  """Estimated cycles of one token whose every row leaves after `segments`
  segments.

  Fills of skipped layers that a forced exit never makes pending (loops of no
  turn) are left out; so is what the compiler gives no estimate for.
  """
  # Segments that control flow has still to run: without a conditional of its
  # own, the first always is.
  left = segments if path.first_too else segments - 1

  def run(name: str, turns: bool) -> int:
    nonlocal left
    total = 0
    for instruction in module.computations[name]:
      if instruction.opcode == "conditional":
        goes, left = left > 0, max(left - 1, 0)
        branch = path.deeper if goes else path.leaves
        total += run(instruction.branches[branch], turns=False)
      elif instruction.opcode == "while":
        if turns and path.by_loops and left > 0:
          left -= 1
          total += run(instruction.calls["body"], turns=False)
      else:
        total += instruction.cycles
    return total

  total = run(module.token_loop(), turns=True)
  if left:
    raise ValueError(
      f"Expected {segments} segments of layers in the loop, got {left} "
      "fewer; ask for those"
      " that it has."
    )
  return total


def moved(module: Module, elements: int) -> list[Instruction]:
  """Instructions of the token loop that only move `elements` numbers or
  more.
  """

  def only_moves(instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
      return instruction.opcode in MOVES
    inside = module.computations[instruction.calls["calls"]]
    return {x.opcode for x in inside} <= {
      *MOVES,
      "parameter",
      "bitcast",
      "tuple",
      "constant",
    }

  loop = module.within(module.token_loop())
  return [x for x in loop if x.elements >= elements and only_moves(x)]


def collectives(module: Module, computation: str = "") -> dict[str, int]:
  """Collectives of a computation and what it runs, with their number; '': the
  token loop.
  """
  inside = module.within(computation or module.token_loop())
  return dict(
    collections.Counter(x.opcode for x in inside if x.opcode in COLLECTIVES)
  )
