"""Rows -> what trains, what chooses, what calibrates, and what is only looked at in the end.

Rows of one source resemble each other, and so do rows whose inputs differ in nothing but case,
punctuation and spaces: such rows stay together, in one part. The parts that measure take one
row of every group, drawn by the seed, so that their prompts are exchangeable: draws of a group,
each as likely, and of a row of it.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

from calm.calibrate import Prompt, planning
from calm.calibrate.generations import files, order

PARTS = ("train", "validation", "calibration", "last")
# (share of the groups, most groups) of the parts that measure; training has the rest.
_SHARES = {
  True: {"validation": (0.1, 128), "calibration": (0.15, 1000), "last": (0.05, 200)},
  False: {"validation": (0.25, 128), "calibration": (0.5, 1000), "last": (0.25, 200)},
}
# Fewest groups of the parts that measure: a choice or a check on fewer says nothing.
_LEAST = {"validation": 20, "last": 10}
# Unchanged outputs certify at the least number; some that change want a multiple of it.
_COMFORT = 4
# Groups that are named: those with so large a share of the rows.
_LARGE = 0.1


@dataclasses.dataclass(frozen=True)
class Splits:
  """The rows of every part.

  Attributes:
    train: rows that train; all rows of their groups.
    validation: prompts on which everything is chosen, one a group.
    calibration: prompts that certify, one a group; nothing else looks at them.
    last: prompts that are looked at once, in the end, one a group.
    num_groups: groups there are.
    num_repeats: rows whose input stands in an earlier row but for case, punctuation and spaces,
      kept in that row's part.
    population: what the promise is about, and the part of every group with many of the rows.
  """

  train: tuple[Prompt, ...]
  validation: tuple[Prompt, ...]
  calibration: tuple[Prompt, ...]
  last: tuple[Prompt, ...]
  num_groups: int
  num_repeats: int
  population: str

  def __str__(self) -> str:
    sizes = ", ".join(f"{name} {len(getattr(self, name))}" for name in PARTS)
    repeats = f"; {self.num_repeats} repeat another's input" if self.num_repeats else ""
    return f"{sizes} rows, of {self.num_groups} groups{repeats}"


def split(
  rows: Sequence[Prompt],
  *,
  trains: bool,
  tolerance: float,
  error_rate: float,
  lower: float = 0.0,
  seed: int = 0,
) -> Splits:
  """Splits rows by group, the same way for the same rows and seed, in whatever order they are.

  Args:
    rows: with their groups (`Prompt.group`), where there are any.
    trains: whether a part trains; else it stays empty and the others are larger.
    tolerance: delta; says how many prompts calibrate at least.
    error_rate: epsilon.
    lower: declared lower bound of the loss.
    seed: of the draw.

  Raises:
    ValueError: too few groups (says how many are needed).
  """
  members, repeats = _groups(rows)
  needed = max(
    planning.min_calibration_size(tolerance, error_rate, lower=lower),
    planning.min_calibration_size(tolerance, error_rate),
  )
  sizes = _sizes(len(members), trains, needed, tolerance, error_rate)
  order = sorted(members, key=lambda name: _draw(seed, name))
  parts, start = {}, 0
  for name in ("calibration", "validation", "last"):
    chosen = order[start : start + sizes[name]]
    start += sizes[name]
    parts[name] = tuple(min(members[g], key=lambda row: _draw(seed, row.id)) for g in chosen)
  rest = order[start:] if trains else []
  parts["train"] = tuple(row for group in rest for row in members[group])
  population = _population(members, parts)
  return Splits(**parts, num_groups=len(members), num_repeats=repeats, population=population)


def _population(
  members: Mapping[str, Sequence[Prompt]], parts: Mapping[str, Sequence[Prompt]]
) -> str:
  """The population of the calibration part, in words."""
  count = sum(map(len, members.values()))
  if len(members) == count:
    return "The promise is about prompts drawn as these rows are."
  text = (
    f"The promise is about one row of each of {len(members)} groups (rows of one source, or of"
    f" one input), every group as likely, however many of the {count} rows it has."
  )
  part_of = {row.id: name for name in PARTS for row in parts[name]}
  for rows in sorted(members.values(), key=len, reverse=True):
    if len(rows) < 2 or len(rows) < _LARGE * count:
      break
    name = rows[0].input[:40] if rows[0].group is None else rows[0].group
    found = [part_of[row.id] for row in rows if row.id in part_of]
    place = f"in the {found[0]} part" if found else "in no part"
    if found[:1] != ["train"] and found:
      place += ", by one row"
    text += (
      f" Group {name!r:.60} has {100 * len(rows) / count:.0f} % of the rows and is {place}:"
      " nothing is promised about its rows alone."
    )
  return text


def _sizes(
  groups: int, trains: bool, needed: int, tolerance: float, error_rate: float
) -> Mapping[str, int]:
  shares = _SHARES[trains]
  sizes = {name: min(round(share * groups), most) for name, (share, most) in shares.items()}
  # Few rows: the promise comes first, then what chooses.
  third = groups // (3 if trains else 2)
  sizes["calibration"] = max(sizes["calibration"], min(third, _COMFORT * needed))
  sizes |= {name: max(sizes[name], least) for name, least in _LEAST.items()}
  least = (needed + sum(_LEAST.values())) * (2 if trains else 1)
  left = groups - sum(sizes.values())
  sizes["calibration"] += min(0, left if not trains else left - sizes["validation"])
  if groups < least or sizes["calibration"] < needed:
    raise ValueError(
      f"Expected at least {least} rows of different groups for `tolerance` {tolerance} and"
      f" `error_rate` {error_rate}: {needed} to calibrate on, the others to choose on and to"
      f" look at{', and as many again to train on' if trains else ''}, got {groups}; give more"
      " rows, or a larger tolerance."
    )
  return sizes


def _groups(rows: Sequence[Prompt]) -> tuple[dict[str, list[Prompt]], int]:
  """Rows by group, groups that share an input joined; and how many rows repeat an input."""
  names = [f"id:{row.id}" if row.group is None else f"group:{row.group}" for row in rows]
  texts = [order.letters(row.input) for row in rows]
  members: dict[str, list[Prompt]] = {}
  for row, name in zip(rows, order.join_equal(names, texts), strict=True):
    members.setdefault(name, []).append(row)
  return members, len(texts) - len(set(texts))


def _draw(seed: int, name: str) -> str:
  return hashlib.sha256(f"{seed}\n{name}".encode()).hexdigest()


def write(folder: pathlib.Path, splits: Splits, names: Sequence[str] = PARTS) -> None:
  """Writes `train.jsonl`, `validation.jsonl`, ... as rows that `calm train` reads too."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    lines = [_line(row) for row in getattr(splits, name)]
    files.write_atomically(folder / f"{name}.jsonl", "".join(lines))


def _line(row: Prompt) -> str:
  value = {"id": row.id, "source": row.group, "input": row.input, "target": list(row.targets)}
  kept = {name: entry for name, entry in value.items() if entry not in (None, [])}
  return json.dumps(kept, ensure_ascii=False) + "\n"
