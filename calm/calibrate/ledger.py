"""What was calibrated on which prompts: an append-only file beside cached generations.

A promise holds with probability 1 - error_rate over the draw of its prompts, if it is the only
one that was asked of them. Of k promises on the same prompts (another metric, measure, method
or tolerance, or more prompts after a look at the first ones) the one that is served because it
came out best fails with probability up to k error_rate. At error_rate / k each, all hold at
once with probability 1 - error_rate (Bonferroni). Whoever calibrates does not count; the ledger
does.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from calm.calibrate import thresholds
from calm.calibrate.calibration import Calibration
from calm.calibrate.generations import files
from calm.calibrate.generations import records as records_lib

LEDGER = "calibrations.jsonl"
# Of each set of rows so many of the smallest digests are kept: sets that share a twentieth of
# their rows hardly ever share none of these.
_KEPT = 64
_MOST_FILES, _MOST_BYTES, _MOST_TOLD = 256, 2**24, 3


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line.

  Attributes:
    when: UTC time, ISO 8601.
    question: what was asked, as JSON values.
    error_rate: epsilon.
    count: rows used.
    rows: the smallest digests of rows.
    threshold: what was found, where it was a threshold.
  """

  when: str
  question: Mapping[str, Any]
  error_rate: float
  count: int
  rows: tuple[str, ...]
  threshold: Any = None

  @property
  def key(self) -> str:
    """Equal for equal questions of equal rows, at whatever error rate."""
    return json.dumps([self.question, self.count, self.rows], sort_keys=True)

  def __str__(self) -> str:
    told = {name: self.question.get(name) for name in ("kind", "metric", "measure", "method")}
    names = ", ".join(str(value) for value in told.values() if value)
    tolerance = self.question.get("tolerance")
    bound = f" within {tolerance}" if tolerance is not None else ""
    return f"{names or 'another'}{bound} at {self.error_rate:g} on {self.count} rows"


def question_of(calibration: Calibration) -> dict[str, Any]:
  """What a calibration asks: everything that one might try several of."""
  procedure = calibration.procedure
  return {
    "kind": calibration.kind,
    "metric": calibration.metric,
    "tolerance": calibration.tolerance,
    "method": calibration.method,
    "testing": calibration.testing,
    "promise": calibration.promise.to_json(),
    "clusters": calibration.clusters,
    "grid": [row.threshold for row in calibration.rows],
    "measure": None if procedure is None else procedure.measure,
    "procedure": None if procedure is None else procedure.digest()[:16],
    "losses": calibration.losses_digest[:16],
  }


def record(
  folder: str | pathlib.Path,
  question: Mapping[str, Any],
  rows: Iterable[str],
  error_rate: float,
  threshold: float | None = None,
) -> str:
  """Writes a line to the ledger of a folder, and says what earlier lines do to the promise.

  Args:
    folder: of the cached generations (or of whatever else the rows are kept in).
    question: what was asked, as JSON values (`question_of`); equal questions are counted once,
      with their last error rate.
    rows: texts of the rows used; lines of disjoint rows do not count. Ledgers of the folders
      beside, above and below are read too.
    error_rate: epsilon, in (0, 1).
    threshold: what was found, for the record.

  Returns:
    Sentences for the user, or '' where nothing else was asked of these rows.

  Raises:
    ValueError: the folder's own ledger is no regular file, or a line of it is none; the message
      names it.
    OSError: the ledger cannot be written.
  """
  folder = pathlib.Path(folder)
  count, kept = _sketch(rows)
  entry = Entry(
    datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    json.loads(json.dumps(question)),
    float(error_rate),
    count,
    kept,
    None if threshold is None else thresholds.threshold_to_json(threshold),
  )
  path, own = folder / LEDGER, []
  if path.exists():
    next(_read(path), None)  # what is mended must be a ledger
    records_lib.drop_partial_line(path)
    own = list(_read(path))
  earlier = [*_beside(folder), *own]
  same = [old for old in own if old.key == entry.key]
  if not same or same[-1].error_rate != entry.error_rate:
    line = records_lib.dump_line(dataclasses.asdict(entry))
    files.append(path, line.encode("utf-8"))
  return _describe(entry, [old for old in earlier if set(old.rows) & set(kept)])


def _describe(entry: Entry, earlier: list[Entry]) -> str:
  latest = {old.key: old for old in sorted(earlier, key=lambda old: old.when)}
  latest.pop(entry.key, None)
  if not latest:
    return ""
  others, number = list(latest.values()), len(latest) + 1
  total = min(1.0, sum(old.error_rate for old in others) + entry.error_rate)
  whole = max(old.error_rate for old in [*earlier, entry])
  shown = "; ".join(map(str, others[:_MOST_TOLD])) + "; ..." * (len(others) > _MOST_TOLD)
  told = (
    f"These rows were calibrated on before ({LEDGER}): {shown}. Each promise holds by itself."
    " The one that is served because it came out best of these fails with probability up to"
    f" {total:.4g}, the sum of their error rates"
  )
  if total <= whole * (1.0 + 1e-9):
    return f"{told}."
  return (
    f"{told}, not {entry.error_rate:.4g}: keep the one that was planned, or make each of the"
    f" {number} again with --error_rate={whole / number:.4g} (error_rate / k), with which all"
    f" hold at once with probability {1.0 - whole:.4g}."
  )


def _sketch(rows: Iterable[str]) -> tuple[int, tuple[str, ...]]:
  """(number of rows, the smallest digests of different ones)."""
  digests = [hashlib.sha256(row.encode("utf-8")).hexdigest()[:16] for row in rows]
  return len(digests), tuple(sorted(set(digests))[:_KEPT])


def _beside(folder: pathlib.Path) -> Iterator[Entry]:
  """Lines of ledgers of folders beside, above and below; what cannot be read is left out."""
  home = folder.resolve()
  above = [home.parent / LEDGER, *home.parent.glob(f"*/{LEDGER}"), *home.glob(f"*/{LEDGER}")]
  for path in sorted({*above} - {home / LEDGER})[:_MOST_FILES]:
    with contextlib.suppress(ValueError, OSError):
      if path.is_file() and path.stat().st_size <= _MOST_BYTES:
        yield from list(_read(path))


def _read(path: pathlib.Path) -> Iterator[Entry]:
  for line in records_lib.read_lines(path):
    try:
      entry = Entry(**{**line.value, "rows": tuple(line.value["rows"])})
      texts = all(isinstance(text, str) for text in (entry.when, *entry.rows))
      whole = texts and isinstance(entry.question, dict) and isinstance(entry.count, int)
      whole = whole and 0.0 < entry.error_rate < 1.0
    except (KeyError, TypeError):
      whole = False
    if not whole:
      raise line.error(
        f"expected a line of a ledger of calibrations, got {line.value!r:.100}; restore the"
        " file, or move it away."
      )
    yield entry
