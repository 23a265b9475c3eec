"""What a calibration is valid for, and where its numbers came from."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from calm import arguments

RULE_VERSION = 1
# Fields that versions before did not record: None in their files, which keep
# their digests.
_ADDED = (
  *(
    "configuration",
    "platform",
    "matmul_precision",
    "weights_dtype",
    "head_dtype",
  ),
  *("base_digest", "encoder_dtype", "reference_dtype", "reference_digest"),
)
# Of those, None is no value but says that nobody knows; nothing can be compared
# with it then.
_UNKNOWN = ("configuration", "platform", "matmul_precision")
# Where decoding runs; everything else says what is decoded and how.
PLATFORM = ("platform", "matmul_precision")


def _plain(value: Any, name: str) -> Any:
  """`value` as what JSON gives back: lists, dicts, finite numbers."""
  try:
    return json.loads(json.dumps(value, allow_nan=False))
  except (TypeError, ValueError) as error:
    text = (
      f"Expected `{name}` to hold JSON values only, with finite numbers, got "
      f"{value!r}."
    )
    raise ValueError(text) from error


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Procedure:
  """One exact way of decoding (frozen; compared field by field)."""

  parameters_digest: str  # of the parameter tree as decoded
  tokenizer_digest: str  # of the vocabulary
  task_prefix: str  # text put before every prompt
  max_input_length: int  # tokens of a prompt that are read
  max_decode_length: int  # most tokens that are generated
  eos_id: int  # the token that ends a sequence
  measure: str  # name of the confidence measure
  exit_layers: tuple[int, ...]  # decoder layers (1-based) that may be exited at
  schedule: Mapping[str, Any]  # {'name': ..., and its numbers}
  propagation: str  # how skipped layers get their keys and values
  # {'digest', 'size'} of the vocabulary shortlist
  shortlist: Mapping[str, Any] | None
  heads: str  # 'shared' or 'per_layer' output heads
  activation_dtype: str  # of the network as decoded
  decode_method: Mapping[str, Any]  # {'name': ..., and its numbers}
  # rows decoded together where they matter (below float32)
  batch_bucket: int | None = None
  rule_version: int = RULE_VERSION  # of the exit rule itself
  # Every size and choice of the network as decoded, which the parameters alone
  # do not tell; None in files of versions that did not record it: not compared
  # then.
  configuration: Mapping[str, Any] | None = None
  platform: str | None = None  # 'cpu', 'gpu' or 'tpu'; None likewise
  # of float32 products, as JAX names it; None likewise
  matmul_precision: str | None = None
  # What matrices and heads are rounded to and stored in; None: matrices in the
  # activation dtype and heads in float32.
  weights_dtype: str | None = None
  # 'int8' where output heads were read in 8 bits first
  head_dtype: str | None = None
  # Of the parameters that every full-depth text depends on, where maps of the
  # exits were fitted beside them.
  base_digest: str | None = None
  # 'int8' where all that is multiplied once a prompt was
  encoder_dtype: str | None = None
  # 'float32' where outputs are compared with the full model's in that dtype;
  # None: with those of full depth decoded as they are themselves.
  reference_dtype: str | None = None
  # `parameters_digest` of another model, with whose full-depth outputs they are
  # compared.
  reference_digest: str | None = None

  def __post_init__(self):
    for name in ("schedule", "shortlist", "decode_method", "configuration"):
      vars(self)[name] = value = _plain(getattr(self, name), name)
      if name in ("schedule", "decode_method") and "name" not in value:
        raise ValueError(
          f"Expected `{name}` to be a dict with a 'name', got {value!r}."
        )

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values, without those that are None in files of
    earlier versions.

    `Procedure(**value)` is the inverse; TypeError where a field is missing or
    unknown.
    """
    value = _plain(dataclasses.asdict(self), "procedure")
    # What was digested before there was such a field keeps its digest.
    return {
      name: v
      for name, v in value.items()
      if v is not None or name not in _ADDED
    }

  def digest(self) -> str:
    """SHA-256 (hexadecimal) of all fields."""
    canonical = json.dumps(
      self.to_json(), sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

  def differences(self, other: "Procedure") -> dict[str, tuple[Any, Any]]:
    """Every field that differs: {name: (value here, value in `other`)}; empty
    if none does.

    Of configurations the entries that differ alone.
    """
    ours = self.to_json()
    theirs = other.to_json()

    def differ(a, b):
      return {n: (a.get(n), b.get(n)) for n in a | b if a.get(n) != b.get(n)}

    found = differ(ours, theirs)
    for name in _UNKNOWN:
      if name not in ours or name not in theirs:
        found.pop(name, None)
    if "configuration" in found:
      entries = differ(ours["configuration"], theirs["configuration"])

      def pick(side):
        return {name: pair[side] for name, pair in entries.items()}

      found["configuration"] = pick(0), pick(1)
    return found


def describe_differences(
  expected: Procedure | None,
  got: Procedure | None,
  *,
  allow_platform: bool = False,
) -> str:
  """One line that names each differing field, or '' when the two procedures are
  the same.

  None is that of outputs from elsewhere; `allow_platform` leaves out where they
  were decoded.
  """
  if expected is None or got is None:
    if expected is got:
      return ""
    present, absent = (
      ("expected", "got") if got is None else ("got", "expected")
    )
    return (
      f"the {present} side has a `procedure`, the {absent} side has none (null)"
    )
  return "; ".join(
    f"`{name}`: expected {ours!r}, got {theirs!r}"
    for name, (ours, theirs) in expected.differences(got).items()
    if not (allow_platform and name in PLATFORM)
  )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Provenance:
  """Where numbers came from: recorded, never compared. Every field may be
  None.
  """

  metric: str | None = None  # name or import path of the text metric
  # what outputs were compared with ('full model' or 'targets')
  references: str | None = None
  grid: tuple[float, ...] | None = None  # thresholds of the run
  num_examples: int | None = None  # prompts of the run
  order: str | None = None  # how prompts were ordered ('permuted' or 'given')
  seed: str | None = None  # of that order
  method: str | None = None  # name of the p-value method
  versions: Mapping[str, str] | None = None  # package versions {name: version}
  # anything else (command, data set, time)
  notes: Mapping[str, Any] | None = None

  def __post_init__(self):
    if self.num_examples is not None and self.num_examples < 0:
      raise ValueError(
        f"Expected `num_examples` from 0, got {self.num_examples}."
      )
    for name in ("versions", "notes"):
      vars(self)[name] = _plain(getattr(self, name), name)

  def to_json(self) -> dict[str, Any]:
    """All fields as JSON values; `Provenance(**value)` is the inverse."""
    return _plain(dataclasses.asdict(self), "provenance")
