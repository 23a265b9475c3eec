"""What a calibration is valid for, and where its numbers came from.

`Procedure` names everything that can change a decoded token. A promise calibrated under one
procedure says nothing about another, so procedures are compared field by field. `Provenance`
tells the story of the numbers; it is recorded and never compared.
"""

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from calm import arguments

RULE_VERSION = 1
# Fields that versions before did not record: None in their files, which keep their digests.
_ADDED = (
  *("configuration", "platform", "matmul_precision", "weights_dtype", "head_dtype"),
  *("base_digest", "encoder_dtype", "reference_dtype", "reference_digest"),
)
# Of those, None is no value but says that nobody knows; nothing can be compared with it then.
_UNKNOWN = ("configuration", "platform", "matmul_precision")
# Where decoding runs; everything else says what is decoded and how.
PLATFORM = ("platform", "matmul_precision")


def _is_named(value: Any) -> bool:
  return isinstance(value, dict) and "name" in value


def _plain(value: Any, name: str) -> Any:
  """`value` as what JSON gives back: lists, dicts, finite numbers."""
  try:
    return json.loads(json.dumps(value, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"Expected `{name}` to hold JSON values only (finite numbers, text, lists, dicts), got"
      f" {value!r}."
    ) from error


@dataclasses.dataclass(frozen=True)
class Procedure:
  """One exact way of decoding (frozen; compared field by field).

  Attributes:
    parameters_digest: digest of the parameter tree as decoded.
    tokenizer_digest: digest of the vocabulary.
    task_prefix: text put before every prompt.
    max_input_length: tokens of a prompt that are read.
    max_decode_length: most tokens that are generated.
    eos_id: the token that ends a sequence.
    measure: name of the confidence measure.
    exit_layers: decoder layers (1-based) that may be exited at.
    schedule: {'name': ..., and its numbers}.
    propagation: how skipped layers get their keys and values.
    shortlist: None, or {'digest': ..., 'size': ...} of the vocabulary shortlist.
    heads: 'shared' or 'per_layer' output heads.
    activation_dtype: dtype of activations.
    decode_method: {'name': ..., and its numbers}.
    batch_bucket: rows decoded together where they matter (below float32), else None.
    rule_version: version of the exit rule itself.
    configuration: every size and choice of the network as decoded, which the parameters alone
      do not tell; None in files of versions that did not record it: not compared then.
    platform: what it was decoded on ('cpu', 'gpu', 'tpu'); None likewise.
    matmul_precision: of products of float32 matrices there, as JAX names it ('default',
      'high', 'highest'); None likewise.
    weights_dtype: what matrices and heads are rounded to and stored in; None: matrices in the
      activation dtype and heads in float32.
    head_dtype: 'int8' where output heads were read in 8 bits first; None: as they were stored.
    base_digest: digest of the parameters that every full-depth text depends on, where maps of
      the exits were fitted beside them; None: there are no such maps.
    encoder_dtype: 'int8' where all that is multiplied once a prompt was in 8 bits; None: as
      `weights_dtype` has it.
    reference_dtype: 'float32' where outputs are compared with the full model's in that dtype;
      None: with those of full depth decoded as they are themselves.
    reference_digest: `parameters_digest` of another model, with whose full-depth outputs they
      are compared; None: with this model's own.
  """

  parameters_digest: str
  tokenizer_digest: str
  task_prefix: str
  max_input_length: int
  max_decode_length: int
  eos_id: int
  measure: str
  exit_layers: tuple[int, ...]
  schedule: Mapping[str, Any]
  propagation: str
  shortlist: Mapping[str, Any] | None
  heads: str
  activation_dtype: str
  decode_method: Mapping[str, Any]
  batch_bucket: int | None = None
  rule_version: int = RULE_VERSION
  configuration: Mapping[str, Any] | None = None
  platform: str | None = None
  matmul_precision: str | None = None
  weights_dtype: str | None = None
  head_dtype: str | None = None
  base_digest: str | None = None
  encoder_dtype: str | None = None
  reference_dtype: str | None = None
  reference_digest: str | None = None

  def __post_init__(self):
    whole = lambda layer: isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
    layers = self.exit_layers
    if not isinstance(layers, tuple | list) or not all(map(whole, layers)):
      raise ValueError(
        f"Expected `exit_layers` to be decoder layers, whole numbers from 1, got {layers!r}."
      )
    object.__setattr__(self, "exit_layers", tuple(map(int, layers)))
    for name in ("schedule", "shortlist", "decode_method", "configuration"):
      object.__setattr__(self, name, _plain(getattr(self, name), name))
    kinds = dict.fromkeys(("schedule", "decode_method"), ("a dict with a 'name'", _is_named))
    kinds |= dict.fromkeys(_ADDED[1:], ("a text or null", lambda v: isinstance(v, str | None)))
    for name, (kind, holds) in kinds.items():
      if not holds(value := getattr(self, name)):
        raise ValueError(f"Expected `{name}` to be {kind}, got {value!r}.")

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values, without those that are None in files of earlier versions."""
    value = _plain(dataclasses.asdict(self), "procedure")
    # What was digested before there was such a field keeps its digest.
    return {name: v for name, v in value.items() if v is not None or name not in _ADDED}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Procedure":
    """The inverse of `to_json`; ValueError where a field is missing or unknown."""
    return cls(**_fields(cls, value, optional=_ADDED))

  def digest(self) -> str:
    """SHA-256 (hexadecimal) of all fields."""
    canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

  def differences(self, other: "Procedure") -> dict[str, tuple[Any, Any]]:
    """Every field that differs: {name: (value here, value in `other`)}; empty if none does.

    Of configurations the entries that differ alone.
    """
    ours, theirs = self.to_json(), other.to_json()
    unknown = {name for name in _UNKNOWN if name not in ours or name not in theirs}
    differ = lambda a, b: [name for name in a | b if a.get(name) != b.get(name)]
    found = {n: (ours.get(n), theirs.get(n)) for n in differ(ours, theirs) if n not in unknown}
    if "configuration" in found:
      here, there = (dict(one or {}) for one in found["configuration"])
      names = differ(here, there)
      pick = lambda one: {n: one.get(n) for n in names}
      found["configuration"] = pick(here), pick(there)
    return found


def unknown_platform(procedure: Procedure | None) -> str:
  """One line that says so where a file does not tell where it was decoded; else ''."""
  missing = [name for name in PLATFORM if procedure and getattr(procedure, name) is None]
  if not missing:
    return ""
  names = " and ".join(f"`{name}`" for name in missing)
  return (
    f"An earlier version wrote it, which did not record {names}:"
    " whether it was decoded on a platform like this one is not checked."
  )


def describe_differences(
  expected: Procedure | None, got: Procedure | None, *, allow_platform: bool = False
) -> str:
  """One line that names each differing field, or '' when the two procedures are the same.

  None is the procedure of outputs from elsewhere. `allow_platform` leaves out where they were
  decoded.
  """
  if expected is None or got is None:
    if expected is got:
      return ""
    present, absent = ("expected", "got") if got is None else ("got", "expected")
    return f"the {present} side has a `procedure`, the {absent} side has none (null)"
  return "; ".join(
    f"`{name}`: expected {ours!r}, got {theirs!r}"
    for name, (ours, theirs) in expected.differences(got).items()
    if not (allow_platform and name in PLATFORM)
  )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Provenance:
  """Where numbers came from: recorded, never compared. Every field may be None.

  Attributes:
    metric: name or import path of the text metric.
    references: what outputs were compared with ('full model' or 'targets').
    grid: thresholds of the run.
    num_examples: prompts of the run.
    order: how prompts were ordered ('permuted' or 'given').
    seed: seed of that order.
    method: name of the p-value method.
    versions: package versions {name: version}.
    notes: anything else (command, data set, time).
  """

  metric: str | None = None
  references: str | None = None
  grid: tuple[float, ...] | None = None
  num_examples: int | None = None
  order: str | None = None
  seed: str | None = None
  method: str | None = None
  versions: Mapping[str, str] | None = None
  notes: Mapping[str, Any] | None = None

  def __post_init__(self):
    if self.num_examples is not None and self.num_examples < 0:
      raise ValueError(f"Expected `num_examples` from 0, got {self.num_examples}.")
    if self.grid is not None:
      object.__setattr__(self, "grid", tuple(float(threshold) for threshold in self.grid))
    for name in ("versions", "notes"):
      object.__setattr__(self, name, _plain(getattr(self, name), name))

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values."""
    return _plain(dataclasses.asdict(self), "provenance")

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Provenance":
    """The inverse of `to_json`; missing fields are None, unknown ones a ValueError."""
    return cls(**_fields(cls, value, [field.name for field in dataclasses.fields(cls)]))


def _fields(cls: Any, value: Any, optional: Sequence[str]) -> Mapping[str, Any]:
  """`value`, a JSON object of the fields of `cls`."""
  if not isinstance(value, Mapping):
    raise ValueError(f"Expected `{cls.__name__.lower()}` to be a JSON object, got {value!r}.")
  known = {field.name for field in dataclasses.fields(cls)}
  unknown, missing = sorted(set(value) - known), sorted(known - set(value) - set(optional))
  if unknown or missing:
    raise ValueError(
      f"Expected `{cls.__name__.lower()}` to have the fields {sorted(known)}, got missing"
      f" {missing}, unknown {unknown}; read it with the version of this package that wrote it."
    )
  return value
