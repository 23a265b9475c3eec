"""What lies in the package and among the golden files: sizes, and prompts to calibrate on."""

import json
import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "calm" / "assets"


def prompts(split: str) -> list[dict]:
  text = (ASSETS / f"prompts_{split}.jsonl").read_text("utf-8")
  return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
  ("folder", "most_bytes"), [(ASSETS, 24e6), (REPOSITORY / "tests" / "golden", 1.5e6)]
)
def test_files_stay_small(folder, most_bytes):
  files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
  assert files and sum(path.stat().st_size for path in files) <= most_bytes


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
