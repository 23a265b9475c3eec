"""What lies in the package and among the golden files: sizes, and prompts to calibrate on."""

import json
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "calm" / "assets"
GOLDEN = REPOSITORY / "tests" / "golden"
FAMILIES = sorted(path for path in (GOLDEN / "huggingface").iterdir() if path.is_dir())


def prompts(split: str) -> list[dict]:
  text = (ASSETS / f"prompts_{split}.jsonl").read_text("utf-8")
  return [json.loads(line) for line in text.splitlines()]


def size(*paths: pathlib.Path) -> int:
  files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
  return sum(f.stat().st_size for f in files if f.is_file() and f.suffix != ".pyc")


def test_the_model_in_the_box_stays_small():
  assert 0 < size(ASSETS) <= 24e6


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.name)
def test_golden_files_of_a_family_of_checkpoints_stay_small(family):
  """Weights, tokenizer and logits: as many families as there are, each within a bound."""
  assert 0 < size(family) <= 100e3


def test_the_other_golden_files_stay_small():
  # What earlier versions wrote, which has to be read as long as there is a reader.
  kept = [GOLDEN / name for name in ("caches", "calibrations")]
  others = [path for path in GOLDEN.iterdir() if path not in (*kept, GOLDEN / "huggingface")]
  assert 0 < size(*others) <= 450e3 and 0 < size(*kept) <= 600e3


def test_the_model_in_the_box_has_layers_to_leave_and_a_classifier():
  config = json.loads((ASSETS / "config.json").read_text("utf-8"))
  assert config["num_decoder_layers"] >= 8 and config["exit_classifier"]


def test_prompts_are_one_a_source_and_no_source_is_in_both_halves():
  calibration, unseen = prompts("calibration"), prompts("unseen")
  assert len(calibration) >= 200 and len(unseen) >= 100
  both = [*calibration, *unseen]
  assert all(row["input"] and row["targets"] and row["group"] for row in both)
  for name in ("id", "group"):
    assert len({row[name] for row in both}) == len(both)


def test_a_notice_says_whose_the_prompts_are():
  notice = (ASSETS / "NOTICE.md").read_text("utf-8")
  assert "Debian" in notice and "copyright" in notice and "`group`" in notice
