"""Files that earlier versions wrote (commit d1de7c0) are read, checked, and made again."""

import json
import pathlib
import shutil

import pytest

from calm.calibrate import Calibration, Online, ledger
from tests.golden import make_calibrations as golden

FOLDER = pathlib.Path(golden.__file__).with_name("calibrations")
LINES = [json.loads(line) for line in (FOLDER / "every_kind.jsonl").read_text().splitlines()]
STORED = {line["name"]: line for line in LINES}
# Libraries differ in the last digits.
digits = lambda text: round(float(text), 9)
rounded = lambda value: json.loads(json.dumps(value), parse_float=digits)


def test_there_is_a_file_of_every_kind():
  assert set(STORED) == set(golden.KINDS) | set(golden.RETIRED)
  assert {value["calibration"]["schema_version"] for value in STORED.values()} == {2}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_calibration_is_read_and_promises_the_same(name, tmp_path):
  stored = STORED[name]["calibration"]
  (path := tmp_path / "calibration.json").write_text(json.dumps(stored))
  found = Calibration.load(path, expect_digest=stored["digest"])
  assert [row.threshold for row in found.rows if row.rejected] == STORED[name]["certified"]
  assert json.loads(json.dumps(found.to_json())) == stored
  assert found.guarantee == stored["guarantee"] and found.certified == (
    stored["threshold"] != "never"
  )


@pytest.mark.parametrize("name", sorted(set(STORED) - set(golden.RETIRED)))
def test_a_stored_calibration_is_verified_by_making_it_again(name):
  stored = Calibration.from_json(STORED[name]["calibration"])
  again = golden.KINDS[name]()
  told = ("digest", "provenance", "guarantee", "reason")  # follow from the others
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
    if line["calibration"]["promise"] == {"name": "mean"}  # version 1 had no other
  ],
)
def test_a_file_of_version_1_is_read(name):
  value = dict(STORED[name]["calibration"])
  for field in ("promise", "parts", "losses_digest", "digest"):
    del value[field]
  found = Calibration.from_json(value | {"schema_version": 1})
  assert [row.threshold for row in found.rows if row.rejected] == STORED[name]["certified"]
  with pytest.raises(ValueError, match="Expected `threshold`"):
    Calibration.from_json(value | {"schema_version": 1, "threshold": 0.02})


def test_a_stored_monitor_is_refused_by_name_and_kept(tmp_path):
  path = shutil.copy(FOLDER / "monitor.jsonl", tmp_path)
  before = pathlib.Path(path).read_bytes()
  with pytest.raises(ValueError, match=r"monitor\.jsonl:1: .* the monitor of an earlier"):
    Online(path, [0.5], tolerance=0.1)
  assert pathlib.Path(path).read_bytes() == before


def test_a_stored_ledger_is_read(tmp_path):
  folder = tmp_path / "alone" / "cache"  # ledgers beside are read too
  folder.mkdir(parents=True)
  shutil.copy(FOLDER / ledger.LEDGER, folder)
  prompts = [f"text {row}" for row in range(160)]
  text = ledger.record(folder, {"kind": "textual"}, prompts, 0.05)
  assert "textual, rouge_l, betting_fixed_level within 0.1 at 0.05 on 160 rows" in text
  assert (
    "up to 0.15, the sum" in text
    and len((folder / ledger.LEDGER).read_text().splitlines()) == 3
  )
