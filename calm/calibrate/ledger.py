"""What was calibrated on which prompts: an append-only file beside caches and fits."""

import contextlib
import datetime
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from calm import arguments, storage
from calm.calibrate import checks, clusters
from calm.calibrate.calibration import Calibration
from calm.calibrate.generations.records import Prompt

# A fit has its ledger in its folder `fit`, where earlier versions wrote the other file.
LEDGER, EARLIER, FIT = "calibrations.jsonl", "certified_rows.json", "fit"
# Of each set of rows so many of the smallest digests are kept: sets that share a twentieth of
# their rows hardly ever share none of these.
_KEPT = 64
_MOST_FILES, _MOST_BYTES, _MOST_LISTED = 256, 2**24, 3
_DAMAGE = (KeyError, TypeError, ValueError)


def keep(
  folder: str | pathlib.Path, calibration: Calibration, prompts: Iterable[Prompt]
) -> str:
  """`record` of a calibration in the folder of its generations; says so where it cannot."""
  procedure = calibration.procedure
  names = ("kind", "metric", "tolerance", "method", "testing", "clusters")
  question = {name: getattr(calibration, name) for name in names} | {
    "promise": calibration.promise.to_json(),
    "grid": [row.threshold for row in calibration.rows],
    "measure": procedure and procedure.measure,
    "procedure": procedure and procedure.digest()[:16],
    "losses": calibration.losses_digest[:16],
  }
  rows = (prompt.input or prompt.id for prompt in prompts)
  try:
    return record(folder, question, rows, calibration.error_rate)
  except (ValueError, OSError) as error:
    return f"This calibration could not be recorded: {error}"


def record(
  folder: str | pathlib.Path,
  question: Mapping[str, Any],
  rows: Iterable[str],
  error_rate: float,
  *,
  around: Sequence[str | pathlib.Path] = (),
  only_look: bool = False,
) -> str:
  """Writes a line to the ledger of a folder; returns what earlier ones do to the promise.

  Of equal questions the last error rate counts; that of a fit has the key 'fit', read as its
  folder. Rows are equal if their letters and digits are. Ledgers beside, above and below the
  folders `around` (by default `folder`) are read too. ValueError where the own one is damaged.
  """
  path = pathlib.Path(folder).resolve() / LEDGER
  texts = [clusters.letters(row).encode("utf-8", "surrogatepass") for row in rows]
  value = {
    "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "question": dict(question),
    "error_rate": float(error_rate),
    "count": len(texts),
    "rows": sorted({hashlib.sha256(text).hexdigest()[:16] for text in texts})[:_KEPT],
  }
  line, own = _line(path, **value), []
  if path.exists():
    next(_read(path), None)  # only a ledger is repaired
    storage.drop_partial_line(path)
    own = list(_read(path))
  same = [old["error_rate"] for old in own if old["key"] == line["key"]]
  if not only_look and same[-1:] != [error_rate]:
    storage.append(path, storage.dump_line(value).encode("utf-8"))
  homes = {pathlib.Path(home).resolve() for home in around or (path.parent,)}
  beside = {
    found
    for base in homes | {home.parent for home in homes}
    for at, name in itertools.product(("", "*/", f"*/{FIT}/"), (LEDGER, EARLIER))
    for found in base.glob(at + name)
  }
  earlier = []
  for other in sorted(beside - {path})[:_MOST_FILES]:
    with contextlib.suppress(*_DAMAGE, OSError):  # what cannot be read is left out
      if other.is_file() and other.stat().st_size <= _MOST_BYTES:
        earlier += list(_read(other))
  return _describe(line, [old for old in earlier + own if {*old["rows"]} & {*line["rows"]}])


def _describe(line: Mapping[str, Any], earlier: list[dict[str, Any]]) -> str:
  latest = {old["key"]: old for old in sorted(earlier, key=lambda old: old["when"])}
  latest.pop(line["key"], None)
  if not latest:
    return ""
  number, total = len(latest) + 1, sum(old["error_rate"] for old in (*latest.values(), line))
  whole, listed = max(old["error_rate"] for old in (*earlier, line)), []
  for old in latest.values():
    words = map(old["question"].get, ("kind", "metric", "measure", "method", FIT))
    names = ", ".join(str(word) for word in words if word) or "another"
    within = old["question"].get("tolerance")
    listed.append(f"{names} within {within} at {old['error_rate']:g} on {old['count']} rows")
  listed[_MOST_LISTED:] = ["..."] * (len(listed) > _MOST_LISTED)
  said = (
    f"Some or all of these rows were calibrated on before ({LEDGER}): {'; '.join(listed)}. Each"
    " promise holds by itself. The one that is served because it came out best of these fails"
    f" with probability up to {min(1.0, total):.4g}, the sum of their error rates"
  )
  if total <= whole * (1.0 + 1e-9):
    return f"{said}."
  return (
    f"{said}, not {line['error_rate']:.4g}: keep the one that was planned, or make each of the"
    f" {number} again with --error_rate={whole / number:.4g} (error_rate / k), with which all"
    f" hold at once with probability {1.0 - whole:.4g}."
  )


def _read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  if path.name == EARLIER:
    value = storage.parse_json(storage.content(path))
    question = {FIT: "", **{name: value[name] for name in ("kind", "metric", "tolerance")}}
    yield _line(path, **value, question=question, count=len(value["rows"]))
    return
  for line in storage.read_lines(path):
    try:
      yield _line(path, **line.value)
    except _DAMAGE as error:
      raise line.error(f"expected a line of a ledger, got none: {error}") from error


@arguments.checked()
def _line(
  path: pathlib.Path,
  when: str,
  question: dict[str, Any],
  error_rate: float,
  count: int,
  rows: list[str],
  **others: Any,
) -> dict[str, Any]:
  """A line with a `key` of its question and rows; `others` are of earlier versions."""
  checks.in_range("error_rate", error_rate, 0.0, 1.0)
  if FIT in question:
    question = {**question, FIT: str(path.parent.parent)}
  rows = sorted(set(rows))[:_KEPT]
  key = json.dumps([question, count, rows], sort_keys=True)
  line = {"when": when, "question": question, "error_rate": error_rate, "count": count}
  return {**line, "rows": rows, "key": key}
