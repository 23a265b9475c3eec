"""Validation of calibration files: whole, in range, and in agreement with themselves.

Every field has its type and range; the decision is made again from the stored p-values, these
from the stored means where a method is a function of them; and the digest is that of the other
fields. A digest finds damage and edits. It does not stop somebody who edits the file and writes
the digest that fits: hand the digest around by another way (`--expect_digest`), or make the
calibration again from its cached outputs (`calm calibrate --verify`).
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from calm.calibrate import checks, methods, testing
from calm.calibrate.generations import order
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


# What a field must be: (a test of its value, what it expects in words), an object of such
# fields, or a list of such values.
_Check = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float, wanted: str, *, null: bool = False) -> _Check:
  """A number strictly between two others."""

  def fits(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return low < value < high if plain else value is None and null

  return fits, wanted


def _line(longest: int) -> _Check:
  fits = functools.partial(checks.is_line, longest=longest)
  return fits, f"one line of at most {longest} printable characters"


def _one_of(names) -> _Check:
  return lambda value: isinstance(value, str) and value in names, f"one of {sorted(names)}"


_ABOVE_1, _BELOW_0 = math.nextafter(1.0, 2.0), math.nextafter(0.0, -1.0)
_FLAG: _Check = (lambda value: isinstance(value, bool), "true or false")
_COUNT: _Check = (
  lambda value: type(value) is int and 0 <= value <= 10**12,
  "a whole number of at least 0",
)
_NUMBER = _number(-math.inf, math.inf, "a finite number")
_RATE = _number(0.0, 1.0, "a number in (0, 1)")
_P_VALUE = _number(_BELOW_0, _ABOVE_1, "a number in [0, 1]")
_LOG_P = _number(-math.inf, -_BELOW_0, "a finite number of at most 0")
_MEAN = _number(-1e300, 1e300, "a finite number or null", null=True)
_HEX: _Check = (checks.is_seed, "at most 64 hexadecimal digits")
_NAME = _line(checks.LONGEST_NAME)
_METHOD = _one_of(methods.SUM_P_VALUES)
_TEXTS: Mapping[str, _Check] = {
  "reason": _line(4000),
  "kind": _line(checks.LONGEST_KIND),
  "metric": _NAME,
  "order": _one_of({"permuted", "given", "irrelevant"}),
  "seed": _HEX,
}
_ROW = {
  "threshold": _P_VALUE,
  "num_examples": _COUNT,
  "mean": _MEAN,
  "p_value": _P_VALUE,
  "log_p_value": _LOG_P,
  "upper_bound": _MEAN,
  "adjusted_p_value": _P_VALUE,
  "rejected": _FLAG,
}
_SUPPORT = {"lower": _NUMBER, "upper": _NUMBER, "binary": _FLAG}
_PART = {
  "name": _NAME,
  "tolerance": _NUMBER,
  "method": _METHOD,
  "share": _number(0.0, _ABOVE_1, "a number in (0, 1]"),
  "ascending": _FLAG,
  "support": _SUPPORT,
  "num_examples": [_COUNT],
  "means": [_MEAN],
  "log_p_values": [_LOG_P],
  "upper_bounds": [_MEAN],
}
_FIELDS: Mapping[str, Any] = {
  **_TEXTS,
  "tolerance": _RATE,
  "error_rate": _RATE,
  "method": _METHOD,
  "testing": _one_of(testing.READABLE),
  "num_examples": _COUNT,
  "clusters": _FLAG,
  "groups_ignored": _FLAG,
  "largest_cluster": _COUNT,
  "sequential": _FLAG,
  "losses_digest": _HEX,
  "guarantee": (lambda value: isinstance(value, str), "a text"),
  "support": _SUPPORT,
  "rows": [_ROW],
  "visited": [_COUNT],
  "knobs": [_NAME],
  "parts": [_PART],
}


def check_texts(calibration: Any) -> None:
  """Raises ValueError unless a calibration's texts are such as can be loaded again."""
  for name, check in _TEXTS.items():
    _check(getattr(calibration, name), check, f"`{name}` of the calibration")
  checks.check_lines(calibration.knobs, "knobs")


def _check(value: Any, wanted: Any, where: str) -> None:
  """Raises ValueError unless a value is as a table above wants it."""
  if isinstance(wanted, list):
    if not isinstance(value, list):
      raise ValueError(f"Expected {where} to be a list of its values, got {value!r:.100}.")
    for number, entry in enumerate(value):
      _check(entry, wanted[0], f"entry {number} of {where}")
  elif isinstance(wanted, Mapping):
    if not isinstance(value, Mapping) or set(value) != set(wanted):
      got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
      fields = sorted(wanted)
      raise ValueError(f"Expected {where} to have the fields {fields}, got {got!r:.300}.")
    for name, check in wanted.items():
      _check(value[name], check, f"`{name}` of {where}")
  elif not wanted[0](value):
    raise ValueError(f"Expected {where} to be {wanted[1]}, got {value!r:.200}.")


def check_fields(value: Any, names: set[str]) -> None:
  """Raises ValueError unless every field is there, of its type, in its range."""
  version = value.get("schema_version") if isinstance(value, Mapping) else None
  if isinstance(version, bool) or version not in (1, SCHEMA_VERSION):
    got = version if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(
      f"Expected `calibration` to have `schema_version` {SCHEMA_VERSION} or 1, got"
      f" {got!r:.100}."
    )
  names = (names if version >= 2 else names - NEW_FIELDS) - (OPTIONAL - set(value))
  names |= {"schema_version", "guarantee"} | ({"digest"} if version >= 2 else set())
  if missing := sorted(names - set(value)):
    raise ValueError(
      f"Expected `calibration` to have the fields {missing}, got none; it is damaged."
    )
  if odd := sorted(set(value) - names):
    raise ValueError(f"Expected `calibration` without other fields, got {odd!r:.200}.")
  for name in _FIELDS.keys() & names:
    _check(value[name], _FIELDS[name], f"`{name}` of the calibration")
  count, columns = len(value["rows"]), [name for name in _PART if isinstance(_PART[name], list)]
  lists = [part[name] for part in value.get("parts", ()) for name in columns]
  lists += [value["knobs"]] if value.get("knobs") else []
  if not count or any(len(column) != count for column in lists):
    raise ValueError(
      f"Expected `rows` of at least one, got {count}, and `knobs` and `parts` of as many."
    )


def _edited(name: str, wanted: Any, got: Any) -> NoReturn:
  raise ValueError(f"Expected `{name}` {wanted}, got {got!r:.200}: the file was edited.")


def check_decision(calibration: Any) -> None:
  """Raises ValueError unless what is certified follows from the stored numbers."""
  promise, rows = calibration.promise, calibration.rows
  promise.check_rows([row.threshold for row in rows])
  tests = promise.tests(calibration.tolerance, calibration.support)
  counted = len(tests) == 1 and tests[0].support.binary and not calibration.clusters
  if counted and not calibration.support.binary:
    _edited("support", f"binary for the promise {promise.name!r}", calibration.support)
  parts = calibration.parts or (_only_part(calibration, tests[0]),)
  wanted = [(test.name, round(test.tolerance, 12), round(test.share, 12)) for test in tests]
  got = [(part.name, round(part.tolerance, 12), round(part.share, 12)) for part in parts]
  if wanted != got:
    _edited("parts", f"of the promise {promise.name!r}: {wanted!r:.300}", got)
  for part in parts:
    _check_part(part, calibration)
  _check_rows(calibration, parts)
  place = promise.place([row.rejected for row in rows])
  threshold = math.inf if place is None else rows[place].threshold
  if calibration.threshold != threshold:
    shown = "'never'" if place is None else threshold
    _edited("threshold", f"{shown}, the one that the rows certify", calibration.threshold)
  for part in parts:
    _check_bounds(part, calibration.error_rate * part.share)


def _only_part(calibration: Any, test: Any) -> Evidence:
  column = lambda name: tuple(getattr(row, name) for row in calibration.rows)
  return Evidence(
    name="",
    tolerance=test.tolerance,
    method=calibration.method,
    support=calibration.support,
    share=1.0,
    ascending=False,
    num_examples=column("num_examples"),
    means=column("mean"),
    log_p_values=column("log_p_value"),
    upper_bounds=column("upper_bound"),
  )


def _check_part(part: Evidence, calibration: Any) -> None:
  log_p, means = np.array(part.log_p_values), np.array(part.means)
  low, high, tolerance = part.support.lower, part.support.upper, part.tolerance
  if not low < tolerance < high:
    _edited("tolerance", f"in ({low:g}, {high:g}), the range of losses", tolerance)
  counts = np.array(part.num_examples, np.float64)
  if counts.max() > calibration.num_examples:
    _edited("num_examples", f"of at most {calibration.num_examples}", int(counts.max()))
  # Losses that left their range prove nothing, and may have any mean.
  if np.any(((means < low - 1e-6) | (means > high + 1e-6)) & (log_p < 0.0)):
    _edited("means", f"in the declared range [{low:g}, {high:g}]", part.means)
  least = counts * math.log1p(-(tolerance - low) / (high - low))
  if part.method == "betting_randomized":
    least = least + math.log(order.seeded_uniform(calibration.seed))
  if np.any(log_p < least - _CLOSE * (1.0 - least)):
    place = int(np.argmin(log_p - least))
    wanted = f"of at least exp({least[place]:.4g}), the least that {int(counts[place])} prompts"
    _edited("p_value", f"{wanted} can prove", f"exp({log_p[place]:.4g})")
  p_value = methods.SUM_P_VALUES[part.method]
  if p_value is None:
    return
  for place in np.flatnonzero(np.isfinite(means) & (counts > 0) & (log_p < 0.0)).tolist():
    count = int(counts[place])
    again = float(p_value(means[place] * count, count, tolerance, log=True))
    if abs(again - log_p[place]) > _CLOSE * (1.0 + abs(again)):
      wanted = f"{again:.6g} of {count} prompts with mean {means[place]:.6g}"
      _edited("log_p_values", f"{wanted} by {part.method!r}", float(log_p[place]))


def _check_bounds(part: Evidence, level: float) -> None:
  """Upper bounds lie in the range of losses, and at most at the tolerance where p <= level."""
  low, high = part.support.lower, part.support.upper
  for log_p, bound in zip(part.log_p_values, part.upper_bounds, strict=True):
    p_value = math.exp(log_p)
    inside = low - 1e-9 <= bound <= high + 1e-9
    agrees = inside and (bound <= part.tolerance) == (p_value <= level)
    if math.isnan(bound):
      agrees = log_p == 0.0
    if not agrees and abs(p_value - level) > 1e-12:
      side = "at most" if p_value <= level else "above"
      wanted = f"in [{low:g}, {high:g}] and {side} {part.tolerance} at p = {p_value:.4g}"
      _edited("upper_bound", wanted, bound)


def _check_rows(calibration: Any, parts) -> None:
  """The decision is that of the stored p-values, and rows repeat their least certain part."""
  sequences = calibration.promise.sequences()
  again = testing.decide(parts, calibration.testing, calibration.error_rate, sequences)
  # p = error_rate may fall on either side by rounding, where it does the stored word counts.
  adjusted = calibration.column("adjusted_p_value")
  close = np.abs(adjusted - calibration.error_rate) <= 1e-12
  worst = lambda name: np.array([getattr(parts[k], name)[j] for j, k in enumerate(again.worst)])
  for name, wanted, slack in (
    ("p_value", np.exp(again.log_p_values), 1e-9),
    ("log_p_value", again.log_p_values, 1e-9),
    ("adjusted_p_value", again.adjusted_p_values, 1e-9),
    ("mean", worst("means"), 0.0),
    ("upper_bound", worst("upper_bounds"), 0.0),
    ("rejected", np.where(close, calibration.column("rejected"), again.rejected), 0.0),
  ):
    got = calibration.column(name)
    same = np.isclose(got, wanted, rtol=slack, atol=slack, equal_nan=True)
    if not same.all():
      row = int(np.argmin(same))
      _edited(name, f"{wanted[row].item()!r} in row {row}", got[row].item())
  if not close.any() and tuple(calibration.visited) != again.visited:
    _edited("visited", f"{again.visited!r:.200}", calibration.visited)
