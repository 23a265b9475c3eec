"""Procedures are compared field by field, and stored ones are read or refused by the field."""

import dataclasses
import json

import pytest

from calm.calibrate.generations import procedure
from calm.calibrate.generations.procedure import describe_differences
from tests.calibrate import laws

MAPPINGS = ("schedule", "shortlist", "decode_method", "configuration")
BASE = laws.procedure(
  configuration={"relpos_max_distance": 128, "emb_dim": 8},
  platform="cpu",
  matmul_precision="default",
)


def changed(name):
  """Another value of a field."""
  if name in MAPPINGS:
    return {"name": "other", "relpos_max_distance": 20, "emb_dim": 8}
  value = getattr(BASE, name)
  other = value + 1 if isinstance(value, int) else "other"
  return (1, 2) if name == "exit_layers" else 8 if name == "batch_bucket" else other


def test_every_field_is_compared_and_changes_the_digest():
  for name in (field.name for field in dataclasses.fields(BASE)):
    other = dataclasses.replace(BASE, **{name: changed(name)})
    assert list(BASE.differences(other)) == [name] and BASE.digest() != other.digest()
    assert f"`{name}`: expected" in describe_differences(BASE, other)
  # Of configurations the entries that differ.
  other = dataclasses.replace(BASE, configuration={"relpos_max_distance": 20, "emb_dim": 8})
  text = describe_differences(BASE, other)
  assert "{'relpos_max_distance': 128}, got {'relpos_max_distance': 20}" in text


def test_same_fields_are_the_same_procedure_whatever_their_containers():
  base = laws.procedure(exit_layers=[1, 2], decode_method={"name": "sample", "k": (1, 2)})
  other = laws.procedure(exit_layers=(1, 2), decode_method={"k": [1, 2], "name": "sample"})
  assert base == other and base.digest() == other.digest() and not base.differences(other)
  assert describe_differences(None, None) == ""
  # Digests of files that were written do not drift.
  assert laws.procedure().digest() == (
    "65cc22c6e0a9dfb10163733d6188342a91a1c5c674cfaf8114866c26c308bfb6"
  )


def test_files_from_before_platforms_were_recorded_are_still_read():
  old = dataclasses.replace(BASE, platform=None, matmul_precision=None)
  assert {"platform", "matmul_precision", "weights_dtype"}.isdisjoint(old.to_json())
  assert procedure.Procedure(**old.to_json()) == old
  assert describe_differences(old, BASE) == ""
  # What older versions stored is known: another dtype of the weights is another procedure.
  narrow = dataclasses.replace(BASE, weights_dtype="bfloat16")
  assert "`weights_dtype`: expected None" in describe_differences(old, narrow)


def test_where_it_was_decoded_is_one_question_and_how_another():
  other = dataclasses.replace(BASE, platform="tpu", matmul_precision="high")
  assert describe_differences(BASE, other) == (
    "`platform`: expected 'cpu', got 'tpu'; `matmul_precision`: expected 'default', got 'high'"
  )
  assert describe_differences(BASE, other, allow_platform=True) == ""
  other = dataclasses.replace(other, measure="state")
  only = describe_differences(BASE, other, allow_platform=True)
  assert only == "`measure`: expected 'softmax', got 'state'"


def test_json_round_trip_through_text():
  story = procedure.Provenance(metric="rouge_l", grid=[0.9, 0.8], versions={"numpy": "2"})
  for one in (laws.procedure(shortlist={"digest": "d", "size": 10}, batch_bucket=4), story):
    assert type(one)(**json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"schedule": {}}, "`schedule` to be a dict with a 'name'"),
    ({"schedule": {"name": "x", "tau": float("nan")}}, "`schedule` to hold JSON values"),
    ({"exit_layers": [1, True]}, "`exit_layers` to be a list of whole numbers, got True"),
    ({"tau": 1}, "unexpected keyword argument 'tau'"),
  ],
)
def test_malformed_procedures_are_refused(change, message):
  with pytest.raises((TypeError, ValueError), match=message):
    procedure.Procedure(**{**BASE.to_json(), **change})
  with pytest.raises(ValueError, match="Expected `num_examples` from 0, got -1"):
    procedure.Provenance(num_examples=-1)
