"""Procedures are compared field by field, and stored ones are read or refused by the field."""

import dataclasses
import json

import pytest

from calm.calibrate.generations import procedure
from calm.calibrate.generations.procedure import describe_differences
from tests.calibrate import laws

CHANGES = dict(
  parameters_digest="q",
  tokenizer_digest="u",
  task_prefix="",
  max_input_length=65,
  max_decode_length=17,
  eos_id=2,
  measure="state",
  exit_layers=(1, 2),
  schedule={"name": "decaying", "temperature": 4.0, "max_decode_length": 16},
  propagation="projected",
  shortlist={"digest": "d", "size": 100},
  heads="per_layer",
  activation_dtype="bfloat16",
  decode_method={"name": "sample", "temperature": 0.5},
  batch_bucket=8,
  rule_version=99,
  configuration={"relpos_max_distance": 20, "emb_dim": 8},
  platform="tpu",
  matmul_precision="highest",
  weights_dtype="bfloat16",
  head_dtype="int8",
  base_digest="b",
  encoder_dtype="int8",
  reference_dtype="float32",
  reference_digest="c" * 64,
)
BASE = laws.procedure(
  configuration={"relpos_max_distance": 128, "emb_dim": 8},
  platform="cpu",
  matmul_precision="default",
)


def test_every_field_is_compared_and_changes_the_digest():
  assert set(CHANGES) == {field.name for field in dataclasses.fields(BASE)}
  for name, value in CHANGES.items():
    other = dataclasses.replace(BASE, **{name: value})
    assert list(BASE.differences(other)) == [name] and BASE.digest() != other.digest()
    assert f"`{name}`: expected" in describe_differences(BASE, other)
  # Of configurations the entries that differ.
  other = dataclasses.replace(BASE, configuration=CHANGES["configuration"])
  text = describe_differences(BASE, other)
  assert "{'relpos_max_distance': 128}, got {'relpos_max_distance': 20}" in text


def test_same_fields_are_the_same_procedure_whatever_their_containers():
  base = laws.procedure(exit_layers=[1, 2], decode_method={"name": "sample", "k": (1, 2)})
  other = laws.procedure(exit_layers=(1, 2), decode_method={"k": [1, 2], "name": "sample"})
  assert base == other and base.digest() == other.digest() and not base.differences(other)
  assert describe_differences(base, other) == "" == describe_differences(None, None)
  for pair in ((base, None), (None, base)):
    assert "(null)" in describe_differences(*pair)
  # Digests of files that were written do not drift.
  assert laws.procedure().digest() == (
    "65cc22c6e0a9dfb10163733d6188342a91a1c5c674cfaf8114866c26c308bfb6"
  )


def test_files_from_before_platforms_were_recorded_are_still_read():
  old = dataclasses.replace(BASE, platform=None, matmul_precision=None)
  assert {"platform", "matmul_precision", "weights_dtype"}.isdisjoint(old.to_json())
  assert procedure.Procedure.from_json(old.to_json()) == old
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
  base = laws.procedure(shortlist={"digest": "d", "size": 10}, batch_bucket=4)
  assert procedure.Procedure.from_json(json.loads(json.dumps(base.to_json()))) == base
  story = procedure.Provenance(metric="rouge_l", grid=[0.9, 0.8], versions={"numpy": "2"})
  assert procedure.Provenance.from_json(json.loads(json.dumps(story.to_json()))) == story
  assert procedure.Provenance.from_json({}) == procedure.Provenance()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"schedule": {}}, "`schedule` to be a dict with a 'name'"),
    ({"decode_method": "greedy"}, "`decode_method` to be a mapping"),
    ({"schedule": {"name": "x", "tau": float("nan")}}, "`schedule` to hold JSON values"),
    ({"shortlist": {"digest": object()}}, "`shortlist` to hold JSON values"),
    ({"exit_layers": "12"}, "`exit_layers` to be a list of whole numbers"),
    ({"exit_layers": [1, True]}, "`exit_layers` to be a list of whole numbers, got True"),
    ({"exit_layers": [1.0]}, "`exit_layers` to be a list of whole numbers"),
    ({"platform": 3}, "`platform` to be a text or None, got 3"),
    ({"measure": None}, "missing 1 required .*'measure'"),
    ({"tau": 1}, "unexpected keyword argument 'tau'"),
    (None, "must be a mapping"),
  ],
)
def test_malformed_procedures_are_refused(change, message):
  value = change and {**BASE.to_json(), **change}
  if change and "measure" in change:
    del value["measure"]
  with pytest.raises((TypeError, ValueError), match=message):
    procedure.Procedure.from_json(value)


@pytest.mark.parametrize(
  "story",
  [{"metric": 3}, {"grid": "0.9"}, {"grid": [True]}, {"num_examples": -1}, {"notes": [1]}],
)
def test_a_story_of_other_types_is_refused(story):
  (name,) = story
  with pytest.raises(ValueError, match=rf"Expected `{name}` (to be|from) .*got"):
    procedure.Provenance.from_json(story)
  with pytest.raises(TypeError, match="'tau'"):
    procedure.Provenance.from_json({"tau": 1})
