"""The rows that certified a fit, as digests in its folder; other fits that certified on them.

Two fits that certify on the same rows hold one promise each; whoever looks at both and takes
the better one has neither. What other fits there were can only be known as far as their folders
are found: those beside the new one, and the folder of the model that is given.
"""

import datetime
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calm.calibrate import Prompt
from calm.calibrate.generations import files
from calm.fitting import splits
from calm.fitting.options import FitOptions

FILE = "certified_rows.json"
_MOST_BYTES, _MOST_FOLDERS = 2**24, 1000


def digests(rows: Sequence[Prompt]) -> list[str]:
  """[num_rows] digests of the inputs, twins alike."""
  texts = [splits.letters(row.input).encode("utf-8", "surrogatepass") for row in rows]
  return [hashlib.sha256(text).hexdigest()[:16] for text in texts]


def write(work: pathlib.Path, rows: Sequence[Prompt], options: FitOptions) -> None:
  """Records the rows before they are looked at; a record that is there stays.

  Args:
    work: the folder `fit` of an output.
    rows: the calibration part.
    options: what the fit is asked for.
  """
  if (work / FILE).exists():
    return
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  asked = {"tolerance": options.tolerance, "kind": options.kind, "metric": options.metric}
  record = {"when": now, **asked, "error_rate": options.error_rate, "rows": digests(rows)}
  files.write_atomically(work / FILE, json.dumps(record, indent=1) + "\n")


def warning(
  rows: Sequence[Prompt], output: pathlib.Path, model: str, options: FitOptions
) -> str:
  """Which fits that can be found certified on these rows, and what that does to the promise; ''
  where none is found.

  Args:
    rows: the calibration part.
    output: folder of the new fit.
    model: folder of the given model.
    options: what the fit is asked for.
  """
  own, wanted = output.resolve(), set(digests(rows))
  found: dict[pathlib.Path, int] = {}
  for folder in _folders(output, model):
    if folder.resolve() not in (own, *found):
      shared = len(wanted.intersection(_read(folder / "fit" / FILE).get("rows", ())))
      found |= {folder.resolve(): shared} if shared else {}
  if not found:
    return ""
  names = ", ".join(f"{count} in {str(path)!r:.120}" for path, count in found.items())
  return (
    f"Of the {len(wanted)} rows that certify here, some have certified another fit: {names}."
    " The promise of each holds by itself; for all of them together, or for the one that is"
    f" taken after looking at them, give each an `error_rate` of {options.error_rate:g} /"
    f" {len(found) + 1}, or certify on other rows."
  )


def _folders(output: pathlib.Path, model: str) -> Iterable[pathlib.Path]:
  yield pathlib.Path(model)
  beside = output.absolute().parent.glob(f"*/fit/{FILE}")
  for path in itertools.islice(beside, _MOST_FOLDERS):
    yield path.parent.parent


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  """A record; nothing where there is none that can be read."""
  try:
    record = files.parse_json(files.content(path, _MOST_BYTES))
  except (OSError, ValueError):
    return {}
  rows = record.get("rows") if isinstance(record, dict) else None
  known = isinstance(rows, list) and all(isinstance(row, str) for row in rows)
  return record if known else {}
