"""Validation of calibration files: fields are in range, and the decision follows from them.

A digest finds damage and edits. It does not stop somebody who edits the file and writes the
digest that fits: hand the digest around by another way (`--expect_digest`), or make the
calibration again from its cached outputs (`calm calibrate --verify`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm.calibrate import checks, methods, testing
from calm.calibrate.testing import Evidence

# 2: digests, promises. Files of version 1 are read; they have none to compare.
SCHEMA_VERSION = 2
NEW_FIELDS = {"promise", "parts", "losses_digest"}
# Left out of files where they are empty.
OPTIONAL = {"knobs", "groups_ignored", "largest_cluster"}
# p-values are compared so closely; libraries differ in the last digits.
_CLOSE = 1e-6


def digest(value: Mapping[str, Any]) -> str:
  """SHA-256 (hexadecimal) of JSON values, without the entry `digest`."""
  kept = {name: entry for name, entry in value.items() if name != "digest"}
  text = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_file(value: Any, names: set[str], expected: str | None) -> None:
  """Raises ValueError unless JSON has the fields of a calibration, and a digest that fits.

  Args:
    value: JSON of a file.
    names: fields of a calibration.
    expected: what the digest must be, if that is known.
  """
  version = value.get("schema_version") if isinstance(value, Mapping) else None
  if type(version) is not int or version not in (1, SCHEMA_VERSION):
    got = version if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(
      f"Expected `calibration` to have `schema_version` {SCHEMA_VERSION} or 1, got"
      f" {got!r:.100}."
    )
  names = (names if version >= 2 else names - NEW_FIELDS) - (OPTIONAL - set(value))
  names |= {"schema_version", "guarantee"} | ({"digest"} if version >= 2 else set())
  if odd := sorted(set(value) ^ names):
    raise ValueError(
      f"Expected `calibration` to have the fields {sorted(names)}, got {odd!r:.200} that are in"
      " one of both only; it is damaged, or of another version."
    )
  found = digest(value)
  if version >= 2 and value["digest"] != found:
    raise ValueError(
      f"Expected `digest` {found}, that of the other fields, got {value['digest']!r:.100}: the"
      " file was edited or damaged after it was written."
    )
  if expected is not None and found != expected.strip().lower():
    raise ValueError(
      f"Expected a calibration of `digest` {expected!r}, got {found}: it is another one, or"
      " was edited."
    )


def check_ranges(calibration: Any) -> None:
  """Raises ValueError unless texts and numbers are such as can be loaded again."""
  one = calibration
  checks.check_lines([one.reason], "reason", 4000)
  checks.check_lines([one.kind], "kind", checks.LONGEST_KIND)
  checks.check_lines([one.metric], "metric")
  checks.check_lines(one.knobs, "knobs")
  checks.check_lines((part.name for part in one.parts), "parts")
  for name in ("tolerance", "error_rate"):
    checks.in_range(name, getattr(one, name), 0.0, 1.0)
  choices = {"testing": testing.READABLE, "order": ("permuted", "given", "irrelevant")}
  for name, known in choices.items():
    if getattr(one, name) not in known:
      raise ValueError(f"Expected `{name}` one of {[*known]}, got {getattr(one, name)!r:.100}.")
  for part in (one, *one.parts):
    if part.method not in methods.SUM_P_VALUES:
      raise ValueError(f"Expected `method` of a calibration, got {part.method!r:.100}.")
  checks.check_seed(one.seed)
  checks.check_seed(one.losses_digest, "losses_digest")
  count, parts = len(one.rows), one.parts
  lengths = [
    len(column) for part in parts for column in vars(part).values() if type(column) is tuple
  ]
  if not count or {count} != {count, *lengths, len(one.knobs or one.rows)}:
    raise ValueError(
      f"Expected `rows` of at least one, got {count}, and `knobs` and `parts` of as many."
    )
  for row in one.rows:
    shares = min(row.threshold, row.p_value, row.adjusted_p_value) >= 0.0
    shares &= max(row.threshold, row.p_value, row.adjusted_p_value) <= 1.0
    if not shares or not -math.inf < row.log_p_value <= 0.0 or row.num_examples < 0:
      raise ValueError(
        f"Expected `rows` of thresholds and p-values in [0, 1], got {row!r:.300}."
      )


def _same(name: str, wanted: Any, got: Any, where: str = "") -> None:
  """Raises ValueError unless two values are equal, numbers to nine digits."""
  equal = wanted == got
  if isinstance(wanted, float):
    both = math.isnan(wanted) and math.isnan(got)
    equal = both or math.isclose(wanted, got, rel_tol=1e-9, abs_tol=1e-9)
  if not equal:
    raise ValueError(
      f"Expected `{name}` {wanted!r:.300}{where}, got {got!r:.300}: the file was edited."
    )


def check_decision(calibration: Any) -> None:
  """Raises ValueError unless what is certified follows from the stored numbers."""
  promise, rows, rate = calibration.promise, calibration.rows, calibration.error_rate
  promise.check_rows([row.threshold for row in rows])
  tests = promise.tests(calibration.tolerance, calibration.support)
  parts = calibration.parts or (_only_part(calibration, tests[0].tolerance),)
  known = lambda one: (one.name, round(one.tolerance, 12), round(one.share, 12))
  _same("parts", [*map(known, tests)], [*map(known, parts)])
  for part in parts:
    _check_p_values(part)
  again = testing.decide(parts, calibration.testing, rate, promise.sequences())
  # p = error_rate may fall on either side by rounding, where it does the stored word counts.
  close = np.abs(calibration.column("adjusted_p_value") - rate) <= 1e-12
  for place, row in enumerate(rows):
    for name, wanted in vars(type(row).of(row.threshold, parts, again, place)).items():
      if name != "rejected" or not close[place]:
        _same(name, wanted, getattr(row, name), f" in row {place}")
  if not close.any():
    _same("visited", again.visited, calibration.visited)
  place = promise.place([row.rejected for row in rows])
  _same(
    "threshold", math.inf if place is None else rows[place].threshold, calibration.threshold
  )


def _only_part(calibration: Any, tolerance: float) -> Evidence:
  """The evidence of a promise of one test, which stands in the rows."""
  column = lambda name: tuple(getattr(row, name) for row in calibration.rows)
  return Evidence(
    name="",
    tolerance=tolerance,
    method=calibration.method,
    support=calibration.support,
    share=1.0,
    ascending=False,
    num_examples=column("num_examples"),
    means=column("mean"),
    log_p_values=column("log_p_value"),
    upper_bounds=column("upper_bound"),
  )


def _check_p_values(part: Evidence) -> None:
  """The p-values are those of the means, where a method is a function of these."""
  p_value = methods.SUM_P_VALUES[part.method]
  columns = zip(part.num_examples, part.means, part.log_p_values, strict=True)
  for count, mean, log_p in columns:
    if p_value is not None and count and log_p < 0.0 and not math.isnan(mean):
      again = float(p_value(mean * count, count, part.tolerance, log=True))
      if abs(again - log_p) > _CLOSE * (1.0 + abs(again)):
        _same("log_p_values", again, log_p)
