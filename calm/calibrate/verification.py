"""What a calibration's file must be before its promise is spoken: whole, and in agreement.

Three checks. Every field has its type and range. The decision (what is certified, the
threshold) is made again from the stored p-values, these from the stored means where a method
is a function of them, and none may be smaller than so many prompts can prove. And the digest is
that of the other fields.

What a digest protects from: a file that was damaged, edited by hand, or cut together from two.
What it does not protect from: somebody who edits the file and writes the digest that fits.
Against that, hand the digest around by another way than the file (`--expect_digest`), or make
the calibration again from its cached outputs (`calm calibrate --verify`).
"""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calm import storage
from calm.calibrate import checks
from calm.calibrate import decision as decision_lib
from calm.calibrate.decision import Evidence
from calm.calibrate.evidence import methods, multiple_testing

if TYPE_CHECKING:
  from calm.calibrate.calibration import Calibration

# 2: digests, promises. Files of version 1 are read; they have none to compare.
SCHEMA_VERSION = 2
_READ = (1, SCHEMA_VERSION)
NEW_FIELDS = {"promise", "parts", "losses_digest"}
_OPTIONAL = {"knobs", "groups_ignored"}
_MOST_BYTES = 64 * 2**20
# p-values are compared so closely; libraries differ in the last digits.
_CLOSE = 1e-6


def read(path: pathlib.Path) -> Any:
  """JSON of a file, without NaN and of a size that a calibration can have.

  Raises:
    ValueError: it is no such JSON, too large, or no regular file.
    OSError: it cannot be read.
  """
  content = storage.content(path, _MOST_BYTES)
  try:
    return storage.parse_json(content)
  except ValueError as error:
    raise ValueError(f"Expected `calibration` to be one JSON object, got {error}.") from error


def digest(value: Mapping[str, Any]) -> str:
  """SHA-256 (hexadecimal) of JSON values, without the entry `digest`."""
  kept = {name: entry for name, entry in value.items() if name != "digest"}
  text = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_digest(value: Mapping[str, Any], expected: str | None = None) -> None:
  """Raises ValueError unless the digest is that of the values, and the expected one."""
  found = digest(value)
  if value["schema_version"] >= 2 and value["digest"] != found:
    raise ValueError(
      f"Expected `digest` {found}, that of the other fields, got {value['digest']!r}: the"
      " file was edited or damaged after it was written."
    )
  if expected is not None and found != expected.strip().lower():
    raise ValueError(
      f"Expected a calibration of `digest` {expected!r}, got {found}: it is another one, or"
      " was edited."
    )


def _number(low: float, high: float, *, open_ends: bool = False, null: bool = False):
  def fits(value: Any) -> bool:
    if value is None:
      return null
    if isinstance(value, bool) or not isinstance(value, int | float):
      return False
    return low < value < high if open_ends else low <= value <= high

  ends = "()" if open_ends else "[]"
  return fits, f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}{' or null' if null else ''}"


def _count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**12


def _line(longest: int):
  fits = functools.partial(checks.is_line, longest=longest)
  return fits, f"one line of at most {longest} printable characters"


def _one_of(names):
  return lambda value: isinstance(value, str) and value in names, f"one of {sorted(names)}"


def _flag(value: Any) -> bool:
  return isinstance(value, bool)


_Check = tuple[Callable[[Any], bool], str]
_NUMBER: _Check = _number(-math.inf, math.inf, open_ends=True)
_P_VALUE = _number(0.0, 1.0)
_LOG_P = _number(-math.inf, 0.0)
_MEAN = _number(-1e300, 1e300, null=True)
_HEX: _Check = (checks.is_seed, "at most 64 hexadecimal digits")
_METHODS = {name for name in methods.METHODS if name != "auto"}
_FIELDS: Mapping[str, _Check] = {
  "tolerance": _number(0.0, 1.0, open_ends=True),
  "error_rate": _number(0.0, 1.0, open_ends=True),
  "reason": _line(4000),
  "method": _one_of(_METHODS),
  "testing": _one_of(set(multiple_testing.PROCEDURES)),
  "kind": _line(checks.LONGEST_KIND),
  "metric": _line(checks.LONGEST_NAME),
  "num_examples": (_count, "a whole number of at least 0"),
  "clusters": (_flag, "true or false"),
  "groups_ignored": (_flag, "true or false"),
  "order": _one_of({"permuted", "given", "irrelevant"}),
  "seed": _HEX,
  "sequential": (_flag, "true or false"),
  "losses_digest": _HEX,
  "guarantee": (lambda value: isinstance(value, str), "a text"),
}
_ROW: Mapping[str, _Check] = {
  "threshold": _number(0.0, 1.0),
  "num_examples": (_count, "a whole number of at least 0"),
  "mean": _MEAN,
  "p_value": _P_VALUE,
  "log_p_value": _LOG_P,
  "upper_bound": _MEAN,
  "adjusted_p_value": _P_VALUE,
  "rejected": (_flag, "true or false"),
}
_SUPPORT: Mapping[str, _Check] = {
  "lower": _NUMBER,
  "upper": _NUMBER,
  "binary": (_flag, "true or false"),
}
_PART: Mapping[str, _Check] = {
  "name": _line(checks.LONGEST_NAME),
  "tolerance": _NUMBER,
  "method": _one_of(_METHODS),
  "share": (lambda v: _number(0.0, 1.0)[0](v) and v > 0, "a number in (0, 1]"),
  "ascending": (_flag, "true or false"),
}
_COLUMNS: Mapping[str, _Check] = {
  "num_examples": (_count, "whole numbers of at least 0"),
  "means": _MEAN,
  "log_p_values": _LOG_P,
  "upper_bounds": _MEAN,
}


def check_texts(calibration: "Calibration") -> None:
  """Raises ValueError unless a calibration's texts are such as can be loaded again."""
  texts = ("reason", "kind", "metric", "order", "seed")
  _check_all(vars(calibration), {name: _FIELDS[name] for name in texts}, "the calibration")
  checks.check_lines(calibration.knobs, "knobs")


def _check_all(value: Any, fields: Mapping[str, _Check], where: str) -> None:
  for name, (fits, wanted) in fields.items():
    if not fits(value[name]):
      raise ValueError(
        f"Expected `{name}` of {where} to be {wanted}, got {value[name]!r:.200}."
      )


def _object(value: Any, where: str, names: set[str]) -> None:
  if not isinstance(value, Mapping) or set(value) != names:
    got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(
      f"Expected {where} to have the fields `{'`, `'.join(sorted(names))}`, got {got!r:.300}."
    )


def _list(value: Any, name: str, least: int = 0) -> list[Any]:
  if not isinstance(value, list) or len(value) < least:
    raise ValueError(
      f"Expected `{name}` to be a list of at least {least} entries, got {value!r:.100}."
    )
  return value


def check_fields(value: Any, names: set[str]) -> None:
  """Every field by itself: there, of its type, in its range.

  Raises:
    ValueError: names the first that is not.
  """
  version = value.get("schema_version") if isinstance(value, Mapping) else None
  if isinstance(version, bool) or version not in _READ:
    got = version if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(
      f"Expected `calibration` to have `schema_version` {SCHEMA_VERSION} or 1, got"
      f" {got!r:.100}."
    )
  names = (names if version >= 2 else names - NEW_FIELDS) - (_OPTIONAL - set(value))
  missing = sorted(names - set(value))
  if missing:
    raise ValueError(
      f"Expected `calibration` to have the fields {missing}, got none; it is damaged."
    )
  extra = {"schema_version", "guarantee"} | ({"digest"} if version >= 2 else set())
  if set(value) != names | extra:
    odd = sorted(set(value) ^ (names | extra))
    raise ValueError(f"Expected `calibration` without or with other fields, got {odd!r:.200}.")
  fields = {name: check for name, check in _FIELDS.items() if name in names | extra}
  _check_all(value, fields, "the calibration")
  _object(value["support"], "`support`", set(_SUPPORT))
  _check_all(value["support"], _SUPPORT, "`support`")
  for number, row in enumerate(_list(value["rows"], "rows", 1)):
    _object(row, f"row {number}", set(_ROW))
    _check_all(row, _ROW, f"row {number}")
  if not all(_count(place) for place in _list(value["visited"], "visited")):
    raise ValueError(f"Expected `visited` to be places, got {value['visited']!r:.100}.")
  knobs = _list(value.get("knobs", []), "knobs")
  if knobs and (len(knobs) != len(value["rows"]) or not all(map(checks.is_line, knobs))):
    raise ValueError(f"Expected `knobs` of texts, one a row, got {knobs!r:.200}.")
  for part in _list(value.get("parts", []), "parts"):
    _check_part(part, len(value["rows"]))


def _check_part(part: Any, count: int) -> None:
  _object(part, "a part", {*_PART, *_COLUMNS, "support"})
  _check_all(part, _PART, "a part")
  _object(part["support"], "`support` of a part", set(_SUPPORT))
  _check_all(part["support"], _SUPPORT, "`support` of a part")
  for name, (fits, wanted) in _COLUMNS.items():
    entries = _list(part[name], name, count)
    if len(entries) != count or not all(fits(entry) for entry in entries):
      raise ValueError(
        f"Expected `{name}` of a part to be {count} times {wanted}, got {entries!r:.100}."
      )


def check_decision(calibration: "Calibration") -> None:
  """What is certified, from the stored numbers; and these against one another.

  Raises:
    ValueError: names what does not follow from the rest.
  """
  calibration.promise.check_rows([row.threshold for row in calibration.rows])
  parts = calibration.parts or (_only_part(calibration),)
  _check_promise(calibration, parts)
  for part in parts:
    _check_part_numbers(part, calibration)
  _check_rows(calibration, parts)
  place = calibration.promise.place([row.rejected for row in calibration.rows])
  threshold = math.inf if place is None else calibration.rows[place].threshold
  if calibration.threshold != threshold:
    shown = "'never'" if place is None else threshold
    raise ValueError(
      f"Expected `threshold` {shown}, the one that the rows certify, got"
      f" {calibration.threshold!r}: the file was edited."
    )
  for part in parts:
    _check_bounds(part, calibration.error_rate * part.share)


def _only_part(calibration: "Calibration") -> Evidence:
  test = calibration.promise.tests(calibration.tolerance, calibration.support)[0]
  rows = calibration.rows
  return Evidence(
    name="",
    tolerance=test.tolerance,
    method=calibration.method,
    support=calibration.support,
    share=1.0,
    ascending=False,
    num_examples=tuple(row.num_examples for row in rows),
    means=tuple(row.mean for row in rows),
    log_p_values=tuple(row.log_p_value for row in rows),
    upper_bounds=tuple(row.upper_bound for row in rows),
  )


def _check_promise(calibration: "Calibration", parts) -> None:
  """The stored parts are those of the promise, with its names, tolerances and shares."""
  tests = calibration.promise.tests(calibration.tolerance, calibration.support)
  counted = len(tests) == 1 and tests[0].support.binary and not calibration.clusters
  if counted and not calibration.support.binary:
    raise ValueError(
      f"Expected a binary `support` for the promise {calibration.promise.name!r}, got"
      f" {calibration.support}: the file was edited."
    )
  wanted = [(test.name, round(test.tolerance, 12), round(test.share, 12)) for test in tests]
  got = [(part.name, round(part.tolerance, 12), round(part.share, 12)) for part in parts]
  if wanted != got:
    raise ValueError(
      f"Expected `parts` of the promise {calibration.promise.name!r}: {wanted!r:.300}, got"
      f" {got!r:.300}: the file was edited."
    )


def _check_part_numbers(part: Evidence, calibration: "Calibration") -> None:
  log_p = np.array(part.log_p_values)
  low, high = part.support.lower, part.support.upper
  if not low < part.tolerance < high:
    raise ValueError(
      f"Expected `tolerance` in ({low:g}, {high:g}), got {part.tolerance!r}, which losses in"
      " that range keep or exceed whatever they are."
    )
  counts = np.array(part.num_examples, np.float64)
  if counts.max() > calibration.num_examples:
    raise ValueError(
      f"Expected at most `num_examples` = {calibration.num_examples} in every row, got"
      f" {int(counts.max())}."
    )
  means = np.array(part.means)
  # Losses that left their range prove nothing, and may have any mean.
  if np.any(((means < low - 1e-6) | (means > high + 1e-6)) & (log_p < 0.0)):
    raise ValueError(f"Expected `means` in the declared range [{low:g}, {high:g}], got others.")
  least = counts * math.log1p(-(part.tolerance - low) / (high - low))
  if np.any(log_p < least - _CLOSE * (1.0 - least)):
    place = int(np.argmin(log_p - least))
    raise ValueError(
      f"Expected `p_value` of at least exp({least[place]:.4g}) at threshold"
      f" {calibration.rows[place].threshold}, the smallest that {int(counts[place])} prompts"
      f" can prove at tolerance {part.tolerance}, got exp({log_p[place]:.4g}): the file was"
      " edited."
    )
  _check_sums(part, log_p, counts, means)


def _check_bounds(part: Evidence, level: float) -> None:
  """Upper bounds lie in the range of losses, and at most at the tolerance where p <= level."""
  low, high = part.support.lower, part.support.upper
  for log_p, bound in zip(part.log_p_values, part.upper_bounds, strict=True):
    p_value = math.exp(log_p)
    if math.isnan(bound):
      agrees, wanted = log_p == 0.0, "a number, as its p-value is below 1"
    else:
      agrees = low - 1e-9 <= bound <= high + 1e-9 and (bound <= part.tolerance) == (
        p_value <= level
      )
      side = "at most" if p_value <= level else "above"
      wanted = f"in [{low:g}, {high:g}] and {side} the tolerance {part.tolerance}"
    if not agrees and abs(p_value - level) > 1e-12:
      raise ValueError(
        f"Expected `upper_bound` {wanted}, got {bound!r} at p = {p_value:.4g}: the file was"
        " edited."
      )


def _check_sums(part: Evidence, log_p, counts, means) -> None:
  """Methods of the sum give the same p-values again."""
  method = methods.METHODS[part.method]
  if not isinstance(method, methods.Method) or method.p_value is None:
    return
  usable = np.isfinite(means) & (counts > 0)
  for place in np.flatnonzero(usable & (log_p < 0.0)).tolist():
    count = int(counts[place])
    again = float(method.p_value(means[place] * count, count, part.tolerance, log=True))
    if abs(again - log_p[place]) > _CLOSE * (1.0 + abs(again)):
      raise ValueError(
        f"Expected `log_p_values` {again:.6g} of {count} prompts with mean {means[place]:.6g}"
        f" at tolerance {part.tolerance} by {part.method!r}, got {log_p[place]:.6g}: the file"
        " was edited."
      )


def _check_rows(calibration: "Calibration", parts) -> None:
  again = decision_lib.decide(parts, calibration.testing, calibration.error_rate)
  edges = np.exp(again.log_p_values)
  adjusted = np.array([row.adjusted_p_value for row in calibration.rows])
  stored = {
    "p_value": (np.array([row.p_value for row in calibration.rows]), edges),
    "log_p_value": (
      np.array([row.log_p_value for row in calibration.rows]),
      again.log_p_values,
    ),
    "adjusted_p_value": (adjusted, again.adjusted_p_values),
  }
  for name, (got, wanted) in stored.items():
    odd = np.flatnonzero(np.abs(got - wanted) > 1e-9 * (1.0 + np.abs(wanted)))
    if len(odd):
      raise ValueError(
        f"Expected `{name}` {float(wanted[odd[0]])!r} in row {odd[0]}, got"
        f" {float(got[odd[0]])!r}: the file was edited."
      )
  if calibration.parts:
    _check_worst(calibration, again.worst)
  # p = error_rate may fall on either side by rounding, where it does the stored word counts.
  close = np.abs(adjusted - calibration.error_rate) <= 1e-12
  rejected = np.array([row.rejected for row in calibration.rows])
  odd = np.flatnonzero((rejected != again.rejected) & ~close)
  if len(odd):
    raise ValueError(
      f"Expected `rejected` {bool(again.rejected[odd[0]])} in row {odd[0]}, where the adjusted"
      f" p-value is {adjusted[odd[0]]:.4g} and the error rate {calibration.error_rate}, got"
      f" {bool(rejected[odd[0]])}: the file was edited."
    )
  if not close.any() and tuple(calibration.visited) != again.visited:
    raise ValueError(
      f"Expected `visited` {again.visited!r:.200}, got {calibration.visited!r:.200}: the file"
      " was edited."
    )


def _check_worst(calibration: "Calibration", worst: np.ndarray) -> None:
  """Rows repeat what the least certain part of each found."""
  for number, row in enumerate(calibration.rows):
    part = calibration.parts[int(worst[number])]
    for name, column in (("mean", part.means), ("upper_bound", part.upper_bounds)):
      got, wanted = getattr(row, name), column[number]
      if got != wanted and not (math.isnan(got) and math.isnan(wanted)):
        raise ValueError(
          f"Expected `{name}` {wanted!r} in row {number}, that of the part {part.name!r}, got"
          f" {got!r}: the file was edited."
        )
