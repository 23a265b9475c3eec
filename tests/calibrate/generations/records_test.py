"""Procedures are compared field by field; prompts and records are read or
refused by name.
"""

import dataclasses
import json

import numpy as np
import pytest

from calm.calibrate.generations import procedure, records
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
  return (
    (1, 2) if name == "exit_layers" else 8 if name == "batch_bucket" else other
  )


def test_every_field_is_compared_and_changes_the_digest():
  for name in (field.name for field in dataclasses.fields(BASE)):
    other = dataclasses.replace(BASE, **{name: changed(name)})
    assert (
      list(BASE.differences(other)) == [name]
      and BASE.digest() != other.digest()
    )
    assert f"`{name}`: expected" in describe_differences(BASE, other)
  # Of configurations the entries that differ.
  other = dataclasses.replace(
    BASE, configuration={"relpos_max_distance": 20, "emb_dim": 8}
  )
  text = describe_differences(BASE, other)
  assert "{'relpos_max_distance': 128}, got {'relpos_max_distance': 20}" in text


def test_same_fields_are_the_same_procedure_whatever_their_containers():
  base = laws.procedure(
    exit_layers=[1, 2], decode_method={"name": "sample", "k": (1, 2)}
  )
  other = laws.procedure(
    exit_layers=(1, 2), decode_method={"k": [1, 2], "name": "sample"}
  )
  assert (
    base == other
    and base.digest() == other.digest()
    and not base.differences(other)
  )
  assert describe_differences(None, None) == ""
  # Digests of files that were written do not drift.
  assert laws.procedure().digest() == (
    "65cc22c6e0a9dfb10163733d6188342a91a1c5c674cfaf8114866c26c308bfb6"
  )


def test_files_from_before_platforms_were_recorded_are_still_read():
  old = dataclasses.replace(BASE, platform=None, matmul_precision=None)
  assert {"platform", "matmul_precision", "weights_dtype"}.isdisjoint(
    old.to_json()
  )
  assert procedure.Procedure(**old.to_json()) == old
  assert describe_differences(old, BASE) == ""
  # What older versions stored is known: another dtype of the weights is another
  # procedure.
  narrow = dataclasses.replace(BASE, weights_dtype="bfloat16")
  assert "`weights_dtype`: expected None" in describe_differences(old, narrow)


def test_where_it_was_decoded_is_one_question_and_how_another():
  other = dataclasses.replace(BASE, platform="tpu", matmul_precision="high")
  assert describe_differences(BASE, other) == (
    "`platform`: expected 'cpu', got 'tpu'; `matmul_precision`: expected "
    "'default', got 'high'"
  )
  assert describe_differences(BASE, other, allow_platform=True) == ""
  other = dataclasses.replace(other, measure="state")
  only = describe_differences(BASE, other, allow_platform=True)
  assert only == "`measure`: expected 'softmax', got 'state'"


def test_json_round_trip_through_text():
  story = procedure.Provenance(
    metric="rouge_l", grid=[0.9, 0.8], versions={"numpy": "2"}
  )
  for one in (
    laws.procedure(shortlist={"digest": "d", "size": 10}, batch_bucket=4),
    story,
  ):
    assert type(one)(**json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"schedule": {}}, "`schedule` to be a dict with a 'name'"),
    (
      {"schedule": {"name": "x", "tau": float("nan")}},
      "`schedule` to hold JSON values",
    ),
    (
      {"exit_layers": [1, True]},
      "`exit_layers` to be a list of whole numbers, got True",
    ),
    ({"tau": 1}, "unexpected keyword argument 'tau'"),
  ],
)
def test_malformed_procedures_are_refused(change, message):
  with pytest.raises((TypeError, ValueError), match=message):
    procedure.Procedure(**{**BASE.to_json(), **change})
  with pytest.raises(
    ValueError, match="Expected `num_examples` from 0, got -1"
  ):
    procedure.Provenance(num_examples=-1)


# ---- Prompts and records


def test_records_round_trip():
  full = records.Record("a", "x", [5, 1], [1, 8], [0.5, 0.0], [0.0, 0.25], -1.5)
  assert records.Record.from_json(full.to_json()) == full
  bare = records.Record("a", "x")
  assert bare.to_json() == {"id": "a", "prediction": "x"}
  assert (
    records.Record.from_json({"id": "a", "prediction": "x", "other": 1}) == bare
  )
  row = records.Record("a", "x", confidences=np.array([0.9, 0.1], np.float32))
  # short digits are kept, and the value
  assert row.to_json()["confidences"] == [0.9, 0.1]
  assert np.float32(row.confidences[0]) == np.float32(0.9)


def test_prompts_read_data_set_rows_too():
  row = {
    "id": "a",
    "source": "s",
    "kind": "k",
    "input": "i",
    "target": ["t", "u"],
  }
  prompt = records.Prompt.from_json(row)
  assert prompt == records.Prompt("a", "i", ("t", "u"), "s")
  assert records.Prompt.from_json(prompt.to_json()) == prompt
  assert records.Prompt.from_json(
    {"id": "a", "input": "i", "target": "t"}
  ).targets == ("t",)
  assert records.Prompt.from_json({"id": "a", "input": "i"}) == records.Prompt(
    "a", "i"
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"id": None}, "`id` to be a text"),
    ({"tokens": [1], "exit_layers": [1, 2]}, "one length"),
    ({"tokens": "12"}, "`tokens` to be a list of whole .* got '12'"),
    ({"tokens": [np.bool_(True)]}, "a list of whole .* got "),
    ({"exit_layers": [1025]}, r"whole numbers in 0 \.\.\. 1024, got 1025"),
    (
      {"confidences": [0.5, float("nan")]},
      r"a list of numbers in \[0, 1\], got nan",
    ),
    ({"score": float("inf")}, "`score` to be a finite number"),
    (
      {"prediction": "half \ud83d"},
      "`prediction` to be Unicode, got half of a surrogate pair",
    ),
  ],
)
def test_bad_records_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    records.Record.from_json({"id": "a", "prediction": "x"} | change)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      b'{"id": "a", "input": "i"}\n{"id": "a", "input": "j"}\n',
      r":2: expected every id once, got 'a' twice",
    ),
    (
      b'{"id": "a", "input": "i"}\n\n[1]\n',
      r":3: expected a JSON object, got list",
    ),
    (
      b'{"id": "a"}\n',
      r":1: expected a prompt, .*, got none: Expected `input` to be a text",
    ),
    (
      b'{"id": "a", "input": "i", "target": [1]}\n',
      r":1: .*`targets` to be a list of texts",
    ),
    (
      b'{"id": "a", "input": "i", "group": true}\n',
      r":1: .*`group` to be a text",
    ),
    (b"\n", "expected a prompt a line, got none; write at least one"),
  ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, message):
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(content)
  with pytest.raises(
    records.GenerationsError, match=f"prompts.jsonl.*{message}"
  ):
    records.read_prompts(path)
