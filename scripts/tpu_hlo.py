"""Reads what XLA compiled for a TPU: the token loop, its estimated cycles, what it moves.

XLA:TPU notes how many cycles it expects beside most instructions. Of control flow it expects
nothing, so the cycles are added up along the path that a forced exit takes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# What moves numbers and makes none.
MOVES = {"copy", "copy-start", "transpose", "reverse"}
COLLECTIVES = (
  *("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"),
  *("all-gather-start", "all-reduce-start", "collective-permute-start"),
)
WIDTHS = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}  # bytes
_ARRAY = re.compile(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    opcode: `fusion`, `while`, ...
    shape: of its result, layout included, as it is written.
    cycles: the compiler's estimate; None where it gives none.
    calls: (role, computation) of what it runs; a conditional's branches have their numbers.
    text: the line.
  """

  name: str
  opcode: str
  shape: str
  cycles: int | None
  calls: tuple[tuple[str, str], ...]
  text: str

  def called(self, role: str) -> str:
    """The computation of a role."""
    return dict(self.calls)[role]

  @property
  def branches(self) -> list[str]:
    """A conditional's computations by the value that picks them (False first)."""
    names = dict(self.calls)
    return [names[str(i)] for i in range(len(names))]

  @property
  def elements(self) -> int:
    """Numbers in the result, of the largest part where it is a tuple."""
    sizes = [0]
    for dimensions in re.findall(r"\b[a-z]\w*\[([\d,]*)\]", self.shape):
      size = 1
      for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
      sizes.append(size)
    return max(sizes)


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled module: instructions in the order of their schedule, by computation."""

  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str

  def within(self, name: str) -> Iterator[Instruction]:
    """Every instruction of a computation and of those that its control flow runs."""
    for instruction in self.computations[name]:
      yield instruction
      if instruction.opcode in ("while", "conditional", "call"):
        for _, called in instruction.calls:
          yield from self.within(called)

  def token_while(self) -> Instruction:
    """The loop over tokens: the longest loop that the entry runs.

    Raises:
      ValueError: there is none.
    """
    loops = [x for x in self.computations[self.entry] if x.opcode == "while"]
    if not loops:
      raise ValueError(
        "Expected a loop over tokens in the compiled module, got none; compile a whole"
        " decoding."
      )
    return max(loops, key=lambda x: sum(1 for _ in self.within(x.called("body"))))

  def token_loop(self) -> str:
    """Its body."""
    return self.token_while().called("body")

  def carried(self) -> dict[str, int]:
    """Bytes of what the loop over tokens carries, by type and dimensions ('bf16[8,512]')."""
    found: dict[str, int] = {}
    for dtype, dimensions in _ARRAY.findall(self.token_while().shape):
      sizes = [int(x) for x in dimensions.split(",") if x]
      name = f"{dtype}[{dimensions}]"
      found[name] = found.get(name, 0) + math.prod(sizes) * WIDTHS[dtype]
    return found


@dataclasses.dataclass(frozen=True)
class Path:
  """How an engine's control flow shows that one more segment of layers is run.

  Attributes:
    deeper: branch of a conditional that runs it.
    leaves: branch of a conditional that does not.
    by_loops: whether segments are loops of at most one turn instead.
    first_too: whether a conditional runs the first segment as well.
  """

  deeper: int = 0
  leaves: int = 0
  by_loops: bool = False
  first_too: bool = False


def parse(text: str) -> Module:
  """A module from `compiled.as_text()`.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, name = "", ""
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
      "Expected the text of a compiled module, got one without an entry; give all of"
      " `as_text()`."
    )
  return Module({key: tuple(value) for key, value in computations.items()}, entry)


def _instruction(line: str) -> Instruction | None:
  found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
  if not found:
    return None
  calls = [(role, called) for role, called in _CALLED.findall(line)]
  listed = re.search(r"branch_computations=\{([^}]*)\}", line)
  if listed:
    calls = list(_numbered(re.findall(r"%?([\w.\-]+)", listed[1])))
  elif found[3] == "conditional":
    names = dict(calls)
    calls = list(_numbered([names["false_computation"], names["true_computation"]]))
  cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
  return Instruction(
    found[1], found[3], found[2], int(cycles[1]) if cycles else None, tuple(calls), line
  )


def _numbered(names: list[str]) -> Iterator[tuple[str, str]]:
  return ((str(i), name) for i, name in enumerate(names))


def step_cycles(
  module: Module,
  path: Path,
  segments: int = 1,
) -> int:
  """Estimated cycles of one token whose every row leaves after `segments` segments.

  Fills of skipped layers that a forced exit never makes pending (loops of no turn) are left
  out; so is what the compiler gives no estimate for.
  """
  # Segments that control flow has still to run: without a conditional of its own, the first
  # always is.
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
          total += run(instruction.called("body"), turns=False)
      else:
        total += instruction.cycles or 0
    return total

  total = run(module.token_loop(), turns=True)
  if left:
    raise ValueError(
      f"Expected {segments} segments of layers in the loop, got {left} fewer; ask for those"
      " that it has."
    )
  return total


def moved(module: Module, elements: int) -> list[Instruction]:
  """Instructions of the token loop that only move `elements` numbers or more."""
  return [
    instruction
    for instruction in module.within(module.token_loop())
    if instruction.elements >= elements and _only_moves(module, instruction)
  ]


def _only_moves(module: Module, instruction: Instruction) -> bool:
  if instruction.opcode in MOVES:
    return True
  if instruction.opcode != "fusion":
    return False
  inside = module.computations[instruction.called("calls")]
  return {x.opcode for x in inside} <= {*MOVES, "parameter", "bitcast", "tuple", "constant"}


def collectives(module: Module, computation: str = "") -> dict[str, int]:
  """Collectives of a computation and what it runs, with their number; '': the token loop."""
  counts: dict[str, int] = {}
  for instruction in module.within(computation or module.token_loop()):
    if instruction.opcode in COLLECTIVES:
      counts[instruction.opcode] = counts.get(instruction.opcode, 0) + 1
  return counts
