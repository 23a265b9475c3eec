"""Files that earlier versions wrote (commit d1de7c0) are read, checked, and
made again.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile

import pytest

from calm.calibrate import (
  Calibration,
  Online,
  calibrate,
  generations,
  open_writer,
)
from calm.calibrate import losses as sequence_losses
from calm.calibrate.generations import foreign
from calm.commands import merge
from tests.golden import make_calibrations as golden

FOLDER = pathlib.Path(golden.__file__).with_name("calibrations")
LINES = [
  json.loads(line)
  for line in (FOLDER / "every_kind.jsonl").read_text().splitlines()
]
STORED = {line["name"]: line for line in LINES}


# Libraries differ in the last digits.
def digits(text):
  return round(float(text), 9)


def rounded(value):
  return json.loads(json.dumps(value), parse_float=digits)


def test_there_is_a_file_of_every_kind():
  assert set(STORED) == set(golden.KINDS) | set(golden.RETIRED)
  assert {
    value["calibration"]["schema_version"] for value in STORED.values()
  } == {2}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_calibration_is_read_and_promises_the_same(name, tmp_path):
  stored = STORED[name]["calibration"]
  (path := tmp_path / "calibration.json").write_text(json.dumps(stored))
  found = Calibration.load(path, expect_digest=stored["digest"])
  assert [row.threshold for row in found.rows if row.rejected] == STORED[name][
    "certified"
  ]
  assert json.loads(json.dumps(found.to_json())) == stored
  assert found.guarantee == stored["guarantee"] and found.certified == (
    stored["threshold"] != "never"
  )


@pytest.mark.parametrize("name", sorted(set(STORED) - set(golden.RETIRED)))
def test_a_stored_calibration_is_verified_by_making_it_again(name):
  stored = Calibration.from_json(STORED[name]["calibration"])
  again = golden.KINDS[name]()
  # follow from the others
  told = ("digest", "provenance", "guarantee", "reason")
  ours, theirs = (
    {name: value for name, value in made.to_json().items() if name not in told}
    for made in (again, stored)
  )
  assert rounded(ours) == rounded(theirs)
  assert again.guarantee == stored.guarantee and again.reason == stored.reason


@pytest.mark.parametrize(
  "name",
  [
    name
    for name, line in STORED.items()
    # version 1 had no other
    if line["calibration"]["promise"] == {"name": "mean"}
  ],
)
def test_a_file_of_version_1_is_read(name):
  value = dict(STORED[name]["calibration"])
  for field in ("promise", "parts", "losses_digest", "digest"):
    del value[field]
  found = Calibration.from_json(value | {"schema_version": 1})
  assert [row.threshold for row in found.rows if row.rejected] == STORED[name][
    "certified"
  ]
  with pytest.raises(ValueError, match="Expected `threshold`"):
    Calibration.from_json(value | {"schema_version": 1, "threshold": 0.02})


def test_a_stored_monitor_is_refused_by_name_and_kept(tmp_path):
  path = shutil.copy(FOLDER / "monitor.jsonl", tmp_path)
  before = pathlib.Path(path).read_bytes()
  with pytest.raises(
    ValueError, match=r"monitor\.jsonl:1: .* the monitor of an earlier"
  ):
    Online(path, [0.5], tolerance=0.1)
  assert pathlib.Path(path).read_bytes() == before


# ---- Caches, bit for bit

CACHES = FOLDER.with_name("caches")
EXPECTED = json.loads((CACHES / "expected.json").read_text("utf-8"))
KINDS = {
  "textual": "rouge_l",
  "risk_signed": "token_f1",
  "risk_clipped": "chrf",
}
RATES = {"tolerance": 0.3, "error_rate": 0.1, "randomized": False}
FORMS = ("plain", "chat", "completion", "response", "vllm", "t5x", "t5x_aux")


def read(root: pathlib.Path) -> dict:
  """What each cache says."""
  with tempfile.TemporaryDirectory() as place:
    # Runs are gone on with, in a copy.
    copy = pathlib.Path(place) / "caches"
    shutil.copytree(root, copy)
    # an earlier version's
    for name in ("whole", "stopped", "shards/shard-00000-of-00002"):
      (copy / name / "calibrations.jsonl").write_text("passed over\n")
    found = {
      name: of_generations(generations.load(copy / name)) for name in FOLDERS
    }
    found["sequential"] = of_sequential(copy / "sequential")
    found |= {
      f"foreign {form}": of_foreign(copy / "foreign", form) for form in FORMS
    }
    found |= {
      name: of_stopped(copy / name) for name in ("stopped", "two_writers")
    }
    found["merging"] = of_merging(copy)
  return json.loads(json.dumps(found).replace(place, ""))


FOLDERS = ("whole", "merged", "earlier")


def of_generations(made) -> dict:
  counts = made.layer_counts()
  return {
    "procedure": None if made.procedure is None else made.procedure.digest(),
    "provenance": made.provenance.to_json(),
    "ids": made.ids,
    "groups": [prompt.group for prompt in made.prompts],
    "references": [prompt.targets for prompt in made.prompts],
    "knobs": made.knobs,
    "layers": None
    if counts is None
    else [count.sum(axis=0).tolist() for count in counts],
    "records": [
      record.to_json() for record in (made.full[3], made.records[-1][0])
    ],
    "losses": {
      kind: of_losses(made, kind)
      for kind in KINDS
      if kind == "textual" or any(prompt.targets for prompt in made.prompts)
    },
  }


def of_losses(made, kind: str) -> dict:
  losses = sequence_losses.compute(made, kind, metric=KINDS[kind])
  return {
    "values": [
      [value.hex() for value in row] for row in losses.values.tolist()
    ],
    "contents": losses.contents,
    "groups": losses.groups,
    "calibration": calibrate(losses, **RATES).to_json(),
  }


def of_sequential(folder: pathlib.Path) -> dict:
  made = generations.load(folder)
  manifest = generations.read_manifest(folder)
  prefixes = sequence_losses.prefix_losses(made, "textual")
  return {
    "ids": made.ids,
    "flags": [manifest["sequential"], manifest["by_group"]],
    "losses": [
      [value.hex() for value in column.tolist()] for column in prefixes
    ],
  }


def of_foreign(folder: pathlib.Path, form: str) -> dict:
  files = {level: folder / f"{form}_{level}.jsonl" for level in (0.9, 0.5)}
  full = folder / f"{form}_never.jsonl"
  made = foreign.gather(full, files)
  if form not in ("plain", "t5x", "t5x_aux", "vllm"):
    prompts = generations.records.read_prompts(folder / "prompts.jsonl")
    made = dataclasses.replace(made, prompts=prompts)
  found = of_generations(made)
  knobs = foreign.gather(full, {f"at {k}": v for k, v in files.items()})
  knobs = dataclasses.replace(knobs, prompts=made.prompts)
  return found | {
    "knob": calibrate(sequence_losses.compute(knobs, "textual"), **RATES).knob
  }


def of_stopped(folder: pathlib.Path) -> dict:
  """What resuming finds and repairs, and which references are asked for."""
  manifest = generations.read_manifest(folder)
  procedure = generations.manifest_procedure(manifest)
  rows = generations.records.read_prompts(folder / "prompts.jsonl")
  writer = open_writer(
    folder, prompts=rows, thresholds=manifest["thresholds"], procedure=procedure
  )
  return {
    "reports": numbers(*writer.reports),
    "done": {
      str(level): sorted(writer.completed_ids(level))
      for level in (float("inf"), 0.9, 0.5)
    },
    "records": [
      r.to_json()
      for r in writer.completed_records(0.9, [row.id for row in rows]).values()
    ],
  }


def of_merging(copy: pathlib.Path) -> dict:
  """Shards merged again are the merged folder, but for two fields of earlier
  versions.
  """
  counts = [
    merge.merge([copy / "shards"], copy / "again"),
    merge.merge([copy / "outputs"], copy / "again.jsonl"),
  ]
  old = re.compile(rb' "(sequential|by_group)": false,\n')

  def content(path):
    return old.sub(b"", path.read_bytes())

  merged = (copy / "merged").iterdir()
  same = all(
    content(copy / "again" / path.name) == content(path) for path in merged
  )
  outputs = (copy / "again.jsonl").read_bytes() == (
    copy / "outputs.jsonl"
  ).read_bytes()
  return {"counts": counts, "same": [same, outputs]}


def numbers(*sentences: str) -> list[list[str]]:
  """The numbers in sentences, whose words may change."""
  return [
    re.findall(r"\d[\d.]*", re.sub(r"/\S+", "", sentence))
    for sentence in sentences
  ]


@pytest.fixture(scope="module")
def found():
  return read(CACHES)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_was_written_before_is_read_as_before(found, name):
  assert found[name] == EXPECTED[name]


def test_the_golden_caches_are_all_looked_at(found):
  assert set(found) == set(EXPECTED) and found["merging"]["same"] == [
    True,
    True,
  ]
