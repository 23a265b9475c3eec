"""What is left of a command that was killed, against the same command left alone."""

import collections
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any


def compare(
  results: Iterable[str], folder: pathlib.Path, undisturbed: pathlib.Path
) -> collections.Counter:
  """What is lost, doubled and different against the undisturbed run.

  Args:
    results: names or patterns of the files, below the folders, that are compared.
    folder: of a run that was killed and ended.
    undisturbed: of one that was left alone.
  """
  found: collections.Counter = collections.Counter()
  found_names = lambda at: {
    path.relative_to(at).as_posix()
    for pattern in results
    for path in at.glob(pattern)
    if path.is_file() and not path.name.startswith(".")
  }
  names = found_names(undisturbed)
  found["different"] += len(found_names(folder) - names)
  for name in sorted(names):
    ours, theirs = (at / name for at in (folder, undisturbed))
    if not name.endswith(".jsonl"):
      found["different"] += not ours.exists() or ours.read_bytes() != theirs.read_bytes()
      continue
    lines = [at.read_bytes().splitlines() if at.exists() else [] for at in (ours, theirs)]
    counts, wanted = (collections.Counter(part) for part in lines)
    found["doubled"] += sum(n - 1 for n in counts.values() if n > 1)
    lost, odd = wanted - counts, counts - wanted
    for line in list(odd):
      other = next((each for each in lost if near(parsed(line), parsed(each))), None)
      if other is not None:
        found["last digits"] += 1
        lost -= collections.Counter([other])
        odd -= collections.Counter([line])
    found["lost"] += sum(lost.values())
    found["different"] += sum(odd.values())
    for sign, part in (("-", lost), ("+", odd)):
      for line in part:
        print(f"{sign} {name}: {line[:2000]!r}", file=sys.stderr)
  return found


def parsed(line: bytes) -> Any:
  """The value of a line, or the line where it is none."""
  try:
    return json.loads(line)
  except ValueError:
    return line


def near(ours: Any, theirs: Any) -> bool:
  """Whether two values are the same but for the last digits of float32."""
  if isinstance(ours, float) and isinstance(theirs, float):
    return abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs))
  if isinstance(ours, dict) and isinstance(theirs, dict):
    return ours.keys() == theirs.keys() and all(near(ours[k], theirs[k]) for k in ours)
  if isinstance(ours, list) and isinstance(theirs, list):
    return len(ours) == len(theirs) and all(map(near, ours, theirs))
  return ours == theirs


def torn(whole: Iterable[str], folder: pathlib.Path) -> int:
  """Files of `whole` that have to be JSON, or JSON lines, where they are there, and are not."""
  found = 0
  for path in (folder / name for name in whole):
    if not path.exists():
      continue
    try:
      text = path.read_text("utf-8")
      for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
        json.loads(part)
    except ValueError:
      found += 1
  return found


def temporaries(folder: pathlib.Path) -> int:
  """How many temporary files there are."""
  return sum(1 for path in folder.rglob(".*.tmp") if path.is_file())
