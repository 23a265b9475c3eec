"""The record of a calibration: a threshold, all that it stands on, and the
promise in words.

A digest finds damage and edits, not somebody who writes the digest that fits:
hand it around by another way (`--expect_digest`), or make the calibration again
(`calm calibrate`).
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm import arguments, storage
from calm.calibrate import checks, display, methods, risks, testing
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations.procedure import (
  Procedure,
  Provenance,
  describe_differences,
)
from calm.calibrate.losses import Support
from calm.calibrate.risks import Mean, Promise
from calm.calibrate.testing import Evidence, Row
from calm.console import sanitize

SCHEMA_VERSION = 2
# which files of version 1 lack
_NEW_FIELDS = {"promise", "parts", "losses_digest"}
# left out where they are empty
_OPTIONAL = {"knobs", "groups_ignored", "largest_cluster"}
_CLOSE = 1e-6  # between p-values; libraries differ in the last digits
_MOST_BYTES = 64 * 2**20
_KINDS = {
  "textual": "dissimilarity to {full}, 1 - {metric} between both outputs,",
  "risk_signed": "increase of the risk, 1 - {metric} against references,"
  " over {full}",
  "risk_clipped": "increase of the risk, 1 - {metric} against references,"
  " over {full}"
  " (decreases counted as 0)",
}


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Calibration:
  """A calibrated threshold, its `promise`, and all that it stands on, with its
  `provenance`.

  Raises:
    ValueError: a text or number is none that `load` would read again.
  """

  # the lowest certified threshold, or `NEVER_EXIT` (the full model)
  threshold: float
  reason: str  # why it is this one, in one sentence
  tolerance: float  # bound on the expected loss
  error_rate: float  # allowed probability that the bound does not hold
  method: str  # name of the p-value method, 'auto' resolved
  testing: str  # name of the multiple-testing procedure
  # what the loss is ('textual', 'risk_signed', 'risk_clipped' or the caller's
  # word)
  kind: str
  metric: str  # name of the text metric
  support: Support  # declared range of losses
  num_examples: int  # prompts (or clusters) in the calibration set
  clusters: bool  # whether losses are means of clusters of prompts
  rows: tuple[Row, ...]  # one `Row` a grid point, in grid order
  visited: tuple[int, ...]  # grid positions in the order of testing
  order: str  # 'permuted' (by `seed`), 'given', or 'irrelevant' to the method
  seed: str  # hexadecimal seed of the permutation
  # whether prompts stopped being decoded when the outcome was clear
  sequential: bool = False
  # how outputs were decoded; None: elsewhere
  procedure: Procedure | None = None
  provenance: Provenance = dataclasses.field(default_factory=Provenance)
  promise: Promise = dataclasses.field(default_factory=Mean)
  # of each test of the promise, where there are several
  parts: tuple[Evidence, ...] = ()
  # SHA-256 of the losses that were tested, '' in a sequential run
  losses_digest: str = ""
  # what was turned, a text a row, where that was no threshold
  knobs: tuple[str, ...] = ()
  # whether clusters were taken for independent prompts
  groups_ignored: bool = False
  # declared, where each prompt counts once; 0: each cluster does
  largest_cluster: int = 0

  def __post_init__(self):
    checks.check_lines([self.reason], "reason", 4000)
    checks.check_lines([self.kind], "kind", checks.LONGEST_KIND)
    for name, texts in (("metric", [self.metric]), ("knobs", self.knobs)):
      checks.check_lines(texts, name)
    checks.check_lines((part.name for part in self.parts), "parts")
    checks.in_range("tolerance", self.tolerance, 0.0, 1.0)
    checks.in_range("error_rate", self.error_rate, 0.0, 1.0)
    checks.check_seed(self.seed)
    checks.check_seed(self.losses_digest, "losses_digest")
    for name, value, known in (
      ("testing", self.testing, testing.READABLE),
      ("order", self.order, ("permuted", "given", "irrelevant")),
      *(
        ("method", method, methods.SUM_P_VALUES)
        for method in (self.method, *self.methods)
      ),
    ):
      arguments.one_of(name, value, known)
    columns = [
      c for part in self.parts for c in vars(part).values() if type(c) is tuple
    ]
    names = (
      self.knobs or self.rows,
      getattr(self.promise, "configurations", self.rows),
    )
    if not self.rows or {len(self.rows)} != {
      len(column) for column in (*names, *columns)
    }:
      raise ValueError(
        f"Expected `rows` of at least one, got {len(self.rows)}, and "
        "`knobs`, `parts` and"
        " configurations of as many."
      )

  @property
  def certified(self) -> bool:
    """Whether any threshold of the grid was certified."""
    return self.threshold != thresholds_lib.NEVER_EXIT

  @property
  def knob(self) -> str | float | None:
    """What is to be served: a knob, or a threshold; None is the full model."""
    place = display.place(self)
    return (
      None
      if place is None
      else self.knobs[place]
      if self.knobs
      else self.threshold
    )

  @property
  def methods(self) -> tuple[str, ...]:
    """The p-value method of each part of the promise."""
    return tuple(part.method for part in self.parts) or (self.method,)

  @property
  def unit(self) -> str:
    """What is drawn: 'prompts', or 'clusters of prompts'."""
    return "clusters of prompts" if self.clusters else "prompts"

  @property
  def guarantee(self) -> str:
    """The promise in plain words, with what it does not say."""
    return " ".join(sentences(self))

  def column(self, name: str) -> np.ndarray:
    """One field of `rows` as an array [num_thresholds]."""
    return np.array([getattr(row, name) for row in self.rows])

  def __repr__(self) -> str:
    return f"{display.table(self)}\n{sanitize(sentences(self)[0])}"

  def refuse_other(
    self, procedure: Procedure | None, *, allow_platform: bool = False
  ) -> None:
    """ValueError names each field that differs; with `allow_platform` the
    platform's may.
    """
    void = (
      "or say that the guarantee is void (`--void_guarantee`, or "
      "`void_guarantee=True`)."
    )
    if self.procedure is None:
      raise ValueError(
        "Expected a calibration with the `procedure` of a run, got "
        "`procedure` null: its"
        " outputs were decoded elsewhere, and nothing here can check that "
        "the promise holds"
        f" for this model; calibrate on outputs of this model, {void}"
      )
    difference = describe_differences(
      self.procedure, procedure, allow_platform=allow_platform
    )
    if difference:
      same = not describe_differences(
        self.procedure, procedure, allow_platform=True
      )
      check = " decode without it (`--allow_platform`)," if same else ""
      raise ValueError(
        "Expected a calibration for this model and these options, got one "
        "for another"
        f" procedure: {difference}; calibrate again under this one,{check} "
        f"{void}"
      )

  @property
  def digest(self) -> str:
    """SHA-256 (hexadecimal) of everything that is stored."""
    return self.to_json()["digest"]

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values, the guarantee for people who read the file,
    and a digest.
    """
    value = {
      "schema_version": SCHEMA_VERSION,
      **{
        n: storage.to_json(v)
        for n, v in vars(self).items()
        if v or n not in _OPTIONAL
      },
      "threshold": thresholds_lib.threshold_to_json(self.threshold),
      "guarantee": self.guarantee,
    }
    return {**value, "digest": digest(value)}

  @classmethod
  def from_json(
    cls, value: Mapping[str, Any], *, expect_digest: str | None = None
  ) -> "Calibration":
    """The inverse of `to_json`; the decision is made again from the stored
    rows.

    ValueError where fields are missing, mean nothing or contradict one another
    or a digest.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    _check_file(value, names, expect_digest)
    procedure = value["procedure"]
    changed = {
      "threshold": thresholds_lib.parse_threshold(value["threshold"]),
      "support": Support(**value["support"]),
      "rows": [_of_json(Row, row) for row in value["rows"]],
      "procedure": None if procedure is None else Procedure(**procedure),
      "provenance": Provenance(**value["provenance"]),
      "promise": risks.from_json(value.get("promise", Mean().to_json())),
      "parts": [_of_json(Evidence, part) for part in value.get("parts", ())],
    }
    found = cls(
      **{name: entry for name, entry in value.items() if name in names}
      | changed
    )
    _check_decision(found)
    return found

  def save(self, path: str | pathlib.Path) -> None:
    """Writes JSON under a temporary name and renames it."""
    text = json.dumps(
      self.to_json(), indent=1, ensure_ascii=False, allow_nan=False
    )
    storage.write_atomically(path, text + "\n")

  @classmethod
  def load(
    cls, path: str | pathlib.Path, *, expect_digest: str | None = None
  ) -> "Calibration":
    """Reads what `save` wrote; ValueError, which names the file, where it is
    none.
    """
    try:
      content = storage.content(path, _MOST_BYTES)
      return cls.from_json(
        storage.parse_json(content), expect_digest=expect_digest
      )
    except (OSError, *storage.DAMAGE) as error:
      text = (
        error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
      )
      raise ValueError(
        f"{path}: expected a calibration, got none: {text}; restore the "
        "file, or calibrate"
        " again."
      ) from error


def _of_json(kind: Any, value: Mapping[str, Any]) -> Any:
  """A row, or the evidence of a part, of its JSON."""

  def number(entry):
    return math.nan if entry is None else entry

  fields: dict[str, Any] = {
    name: list(map(number, entry)) if isinstance(entry, list) else number(entry)
    for name, entry in value.items()
  }
  if "support" in fields:
    fields["support"] = Support(**fields["support"])
  return kind(**fields)


def digest(value: Mapping[str, Any]) -> str:
  """SHA-256 (hexadecimal) of JSON values, without the entry `digest`."""
  kept = {name: entry for name, entry in value.items() if name != "digest"}
  text = json.dumps(
    kept, sort_keys=True, separators=(",", ":"), allow_nan=False
  )
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _check_file(value: Any, names: set[str], expected: str | None) -> None:
  """Raises ValueError unless JSON has the fields of a calibration, and a digest
  that fits.
  """
  version = value.get("schema_version") if isinstance(value, Mapping) else None
  if type(version) is not int or version not in (1, SCHEMA_VERSION):
    got = version if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(
      f"Expected `calibration` to have `schema_version` {SCHEMA_VERSION} or "
      "1, got"
      f" {got!r:.100}."
    )
  names = (names if version >= 2 else names - _NEW_FIELDS) - (
    _OPTIONAL - set(value)
  )
  names |= {"schema_version", "guarantee"} | (
    {"digest"} if version >= 2 else set()
  )
  if odd := sorted(set(value) ^ names):
    raise ValueError(
      f"Expected `calibration` to have the fields {sorted(names)}, got "
      f"{odd!r:.200} that are in"
      " one of both only; it is damaged, or of another version."
    )
  found = digest(value)
  if version >= 2 and value["digest"] != found:
    raise ValueError(
      f"Expected `digest` {found}, that of the other fields, got "
      f"{value['digest']!r:.100}: the"
      " file was edited or damaged after it was written."
    )
  if expected is not None and found != expected.strip().lower():
    raise ValueError(
      f"Expected a calibration of `digest` {expected!r}, got {found}: it is "
      "another one, or"
      " was edited."
    )


def _same(name: str, wanted: Any, got: Any, where: str = "") -> None:
  """Raises ValueError unless two values are equal, numbers to nine digits."""
  equal = wanted == got
  if isinstance(wanted, float):
    both = math.isnan(wanted) and math.isnan(got)
    equal = both or math.isclose(wanted, got, rel_tol=1e-9, abs_tol=1e-9)
  if not equal:
    raise ValueError(
      f"Expected `{name}` {wanted!r:.300}{where}, got {got!r:.300}: the file "
      "was edited."
    )


def _check_decision(one: Calibration) -> None:
  """Raises ValueError unless what is certified follows from the stored
  numbers.
  """
  promise = one.promise
  levels = one.column("threshold").tolist()
  if not isinstance(promise, risks.Configurations):
    thresholds_lib.validate_grid(levels)
  tests = promise.tests(one.tolerance, one.support)
  parts = one.parts
  if not parts:  # the evidence of a promise of one test stands in the rows

    def column(name):
      return tuple(one.column(name).tolist())

    only = Evidence(
      name="",
      tolerance=tests[0].tolerance,
      support=one.support,
      method=one.method,
      num_examples=column("num_examples"),
      means=column("mean"),
      log_p_values=column("log_p_value"),
      upper_bounds=column("upper_bound"),
    )
    parts = (only,)

  def known(one):
    return (one.name, round(one.tolerance, 12), round(one.share, 12))

  _same("parts", [*map(known, tests)], [*map(known, parts)])
  for part in parts:
    # The p-values are those of the means, where a method is a function of
    # these.
    if (p_value := methods.SUM_P_VALUES[part.method]) is None:
      continue
    columns = zip(part.num_examples, part.means, part.log_p_values, strict=True)
    for count, mean, log_p in columns:
      if count and log_p < 0.0 and not math.isnan(mean):
        again = float(p_value(mean * count, count, part.tolerance, log=True))
        if abs(again - log_p) > _CLOSE * (1.0 + abs(again)):
          _same("log_p_values", again, log_p)
  rows, visited, _ = testing.decide(
    parts, levels, one.testing, one.error_rate, promise.grids
  )
  # p = error_rate may fall on either side by rounding, where it does the stored
  # word counts.
  close = np.abs(one.column("adjusted_p_value") - one.error_rate) <= 1e-12
  for place, (row, wanted) in enumerate(zip(one.rows, rows, strict=True)):
    for name, value in vars(wanted).items():
      if name != "rejected" or not close[place]:
        _same(name, value, getattr(row, name), f" in row {place}")
  if not close.any():
    _same("visited", visited, one.visited)
  place = promise.place(one.column("rejected"))
  _same(
    "threshold", math.inf if place is None else levels[place], one.threshold
  )


def sentences(calibration: Calibration) -> list[str]:
  """The sentences of the guarantee; the first is the promise."""
  one = calibration
  procedure = calibration.procedure
  largest = calibration.largest_cluster
  full = "the full model"
  if procedure and procedure.reference_digest is not None:
    full += f" that was given (parameters {procedure.reference_digest[:12]})"
  if procedure and procedure.reference_dtype is not None:
    full += f" in {procedure.reference_dtype}"
  if not one.certified:
    known = "its loss against itself is 0 by definition."
    rest = known if one.kind in _KINDS else "nothing is promised of its loss."
    never = thresholds_lib.NEVER_EXIT_TEXT
    return [
      f"No threshold is certified, so {full} is used ({never}); {rest}",
      one.reason,
    ]
  loss = _KINDS.get(one.kind, "loss").format(metric=one.metric, full=full)
  served = repr(one.knob) if one.knobs else f"threshold {one.threshold:.10g}"
  over = ""
  counted = (
    ", in the average over {}, of which each counts once whatever its {},"
  )
  if largest:
    over = counted.format("prompts", "cluster")
  elif one.clusters:
    over = counted.format("clusters", "size")
  unit = "prompts" if largest else one.unit
  most = "at most " if one.sequential else ""  # it may have stopped before
  said = [
    f"With probability at least {1.0 - one.error_rate:.10g} over independent "
    "draws of"
    f" the {most}{one.num_examples} calibration {one.unit}, decoding with"
    f" {served} has{over} {one.promise.statement(one, loss)}.",
    one.promise.limits.format(**{**vars(one.promise), "unit": unit}),
    f"It holds if these {one.unit} and those that are served are independent "
    "draws of"
    " one kind, and if grid, method, tolerance and error rate were fixed "
    "before these losses"
    " were seen.",
  ]
  if largest:
    said.append(
      f"No cluster has more than {largest} prompts: the caller declared it."
    )
  elif one.clusters:
    said.append(
      "Within a cluster it is the average over its prompts that the promise "
      "is about. Nothing"
      " is said of prompts that are counted one by one: where large clusters "
      "lose more than"
      " small ones, the bound may fail for them."
    )
  if one.support.binary and one.kind not in _KINDS:
    said.append("Every loss is taken to be 0 or 1 by its nature.")
  if "betting_randomized" in one.methods:
    said.append(
      "The test is randomised: a uniform that was drawn beside the losses, "
      "with the order of"
      f" prompts (seed {one.seed}), decides what they leave open at the end."
    )
  if one.order == "given":
    said.append(
      "The test saw prompts in the order given by the caller, who answers "
      "for its having been"
      " fixed before any loss was seen."
    )
  if one.groups_ignored:
    said.append(
      "Some prompts share a group or an input; the caller took each for an "
      "independent draw,"
      " and answers for it."
    )
  if procedure is None:
    said.append(
      "The outputs were decoded elsewhere: the user answers for their being "
      "decoded as they"
      " will be served."
    )
  return said
