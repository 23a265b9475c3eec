"""What lies in the package and among the golden files: sizes, and prompts to
calibrate on.
"""

import json
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "calm" / "assets"
GOLDEN = REPOSITORY / "tests" / "golden"


def size(*paths: pathlib.Path) -> int:
  files = [
    f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])
  ]
  return sum(
    f.stat().st_size for f in files if f.is_file() and f.suffix != ".pyc"
  )


def test_what_is_carried_around_stays_small():
  assert 0 < size(ASSETS) <= 24e6
  # weights, tokenizer and logits
  for family in (GOLDEN / "huggingface").iterdir():
    assert size(family) <= 100e3, family
  # What earlier versions wrote, which has to be read as long as there is a
  # reader.
  kept = [GOLDEN / name for name in ("caches", "calibrations")]
  others = [
    path
    for path in GOLDEN.iterdir()
    if path not in (*kept, GOLDEN / "huggingface")
  ]
  assert 0 < size(*others) <= 450e3 and 0 < size(*kept) <= 600e3


def test_prompts_are_one_a_source_and_no_source_is_in_both_halves():
  texts = [
    (ASSETS / f"prompts_{n}.jsonl").read_text()
    for n in ("calibration", "unseen")
  ]
  calibration, unseen = (
    [json.loads(line) for line in text.splitlines()] for text in texts
  )
  assert len(calibration) >= 200 and len(unseen) >= 100
  both = [*calibration, *unseen]
  assert all(row["input"] and row["targets"] and row["group"] for row in both)
  for name in ("id", "group"):
    assert len({row[name] for row in both}) == len(both)
  notice = (ASSETS / "NOTICE.md").read_text("utf-8")  # whose the prompts are
  assert "Debian" in notice and "copyright" in notice and "`group`" in notice
