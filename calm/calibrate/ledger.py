"""What was calibrated on which prompts: an append-only file beside cached generations and fits.

A promise holds with probability 1 - error_rate over the draw of its prompts, if it is the only
one that was asked of them. Of k promises on the same prompts the one that came out best fails
with probability up to k error_rate; at error_rate / k each, all hold at once (Bonferroni).
"""

import contextlib
import datetime
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from calm import storage
from calm.calibrate import thresholds
from calm.calibrate.calibration import Calibration
from calm.calibrate.generations import order
from calm.calibrate.generations.records import Prompt

# A fit has its ledger in its folder `fit`, where earlier versions wrote the other file.
LEDGER, EARLIER, FIT = "calibrations.jsonl", "certified_rows.json", "fit"
# Of each set of rows so many of the smallest digests are kept: sets that share a twentieth of
# their rows hardly ever share none of these.
_KEPT = 64
_MOST_FILES, _MOST_BYTES, _MOST_LISTED = 256, 2**24, 3
_DAMAGE = (KeyError, TypeError, AttributeError, ValueError)


def keep(
  folder: str | pathlib.Path, calibration: Calibration, prompts: Iterable[Prompt]
) -> str:
  """`record` of a calibration in the folder of its generations; says so where it cannot."""
  procedure = calibration.procedure
  names = ("kind", "metric", "tolerance", "method", "testing", "clusters")
  question = {name: getattr(calibration, name) for name in names} | {
    "promise": calibration.promise.to_json(),
    "grid": [row.threshold for row in calibration.rows],
    "measure": None if procedure is None else procedure.measure,
    "procedure": None if procedure is None else procedure.digest()[:16],
    "losses": calibration.losses_digest[:16],
  }
  rows = (prompt.input or prompt.id for prompt in prompts)
  try:
    return record(folder, question, rows, calibration.error_rate, calibration.threshold)
  except (ValueError, OSError) as error:
    return f"This calibration could not be recorded: {error}"


def record(
  folder: str | pathlib.Path,
  question: Mapping[str, Any],
  rows: Iterable[str],
  error_rate: float,
  threshold: float | None = None,
  *,
  around: Sequence[str | pathlib.Path] = (),
  only_look: bool = False,
) -> str:
  """Writes a line to the ledger of a folder, and says what earlier lines do to the promise.

  Args:
    folder: of the cached generations, or of whatever else the rows are kept in.
    question: what was asked, as JSON values; equal questions are counted once, with their last
      error rate. Of a fit it has the key 'fit', which is read as its folder.
    rows: texts of the rows used, equal if their letters and digits are.
    error_rate: epsilon, in (0, 1).
    threshold: what was found, for the record.
    around: folders beside, above and below which ledgers are read too; by default `folder`.
    only_look: adds no line.

  Returns:
    Sentences for the user, or '' where nothing else was asked of these rows.

  Raises:
    ValueError: the folder's own ledger is no regular file, or a line of it is none.
    OSError: the ledger cannot be written.
  """
  path = pathlib.Path(folder).resolve() / LEDGER
  digests = [
    hashlib.sha256(order.letters(row).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    for row in rows
  ]
  text = storage.dump_line(
    {
      "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "question": dict(question),
      "error_rate": float(error_rate),
      "count": len(digests),
      "rows": sorted(set(digests))[:_KEPT],
      "threshold": None if threshold is None else thresholds.threshold_to_json(threshold),
    }
  )
  line, own = _checked(json.loads(text), path), []
  if path.exists():
    next(_read(path), None)  # only a ledger is repaired
    storage.drop_partial_line(path)
    own = list(_read(path))
  same = [old["error_rate"] for old in own if old["key"] == line["key"]]
  if not only_look and same[-1:] != [line["error_rate"]]:
    storage.append(path, text.encode("utf-8"))
  earlier = [*_beside(path, around or (path.parent,)), *own]
  return _describe(line, [old for old in earlier if set(old["rows"]) & set(line["rows"])])


def _describe(line: Mapping[str, Any], earlier: list[dict[str, Any]]) -> str:
  latest = {old["key"]: old for old in sorted(earlier, key=lambda old: old["when"])}
  latest.pop(line["key"], None)
  if not latest:
    return ""
  others, number = list(latest.values()), len(latest) + 1
  total = min(1.0, sum(old["error_rate"] for old in others) + line["error_rate"])
  whole = max(old["error_rate"] for old in [*earlier, line])
  listed = "; ".join(map(_words, others[:_MOST_LISTED])) + "; ..." * (number > _MOST_LISTED + 1)
  sentence = (
    f"Some or all of these rows were calibrated on before ({LEDGER}): {listed}. Each promise"
    " holds by itself. The one that is served because it came out best of these fails with"
    f" probability up to {total:.4g}, the sum of their error rates"
  )
  if total <= whole * (1.0 + 1e-9):
    return f"{sentence}."
  return (
    f"{sentence}, not {line['error_rate']:.4g}: keep the one that was planned, or make each of"
    f" the {number} again with --error_rate={whole / number:.4g} (error_rate / k), with which"
    f" all hold at once with probability {1.0 - whole:.4g}."
  )


def _words(line: Mapping[str, Any]) -> str:
  values = map(line["question"].get, ("kind", "metric", "measure", "method", FIT))
  names = ", ".join(str(value) for value in values if value)
  tolerance = line["question"].get("tolerance")
  bound = f" within {tolerance}" if tolerance is not None else ""
  return f"{names or 'another'}{bound} at {line['error_rate']:g} on {line['count']} rows"


def _beside(own: pathlib.Path, around: Iterable[str | pathlib.Path]) -> Iterator[dict]:
  """Lines of ledgers beside, above and below folders; what cannot be read is left out."""
  paths: set[pathlib.Path] = set()
  for home in (pathlib.Path(folder).resolve() for folder in around):
    for name in (LEDGER, f"{FIT}/{LEDGER}", f"{FIT}/{EARLIER}"):
      paths |= {home / name, home.parent / name}
      paths |= {*home.parent.glob(f"*/{name}"), *home.glob(f"*/{name}")}
  for path in sorted(paths - {own})[:_MOST_FILES]:
    with contextlib.suppress(*_DAMAGE, OSError):
      if path.is_file() and path.stat().st_size <= _MOST_BYTES:
        yield from list(_read(path))


def _read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  if path.name == EARLIER:
    yield _checked(storage.parse_json(storage.content(path, _MOST_BYTES)), path)
    return
  for line in storage.read_lines(path):
    try:
      yield _checked(line.value, path)
    except _DAMAGE as error:
      raise line.error(
        f"expected a line of a ledger of calibrations, got {line.value!r:.100}; restore the"
        " file, or move it away."
      ) from error


def _checked(value: Any, path: pathlib.Path) -> dict[str, Any]:
  """A line, or what earlier versions wrote of a fit, with a `key` of its question and rows."""
  line = dict(value)
  if path.name == EARLIER:
    line["question"] = {FIT: ""} | {n: line[n] for n in ("kind", "metric", "tolerance")}
    line["count"] = len(line["rows"])
  if FIT in line["question"]:
    line["question"] = {**line["question"], FIT: str(path.parent.parent)}
  line["rows"] = sorted(set(line["rows"]))[:_KEPT]
  texts = all(isinstance(text, str) for text in (line["when"], *line["rows"]))
  whole = texts and isinstance(line["question"], dict) and isinstance(line["count"], int)
  if not whole or not 0.0 < line["error_rate"] < 1.0:
    raise ValueError(f"Expected a line of a ledger, got {value!r:.100}; restore it.")
  parts = [line["question"], line["count"], line["rows"]]
  return {**line, "key": json.dumps(parts, sort_keys=True)}
