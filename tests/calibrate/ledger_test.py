"""The ledger of calibrations: what was asked of the same prompts, and what that costs."""

import hashlib
import json
import os

import pytest

from calm.calibrate import GenerationsError, ledger

ROWS = [f"prompt {row}" for row in range(200)]
QUESTION = {"kind": "textual", "metric": "rouge_l", "tolerance": 0.1}
OTHER = {**QUESTION, "metric": "chrf"}


def lines(folder):
  return [json.loads(line) for line in (folder / ledger.LEDGER).read_text().splitlines()]


@pytest.fixture
def tmp_path(tmp_path):
  """A folder without others beside it, whose ledgers would be read."""
  (folder := tmp_path / "runs").mkdir()
  return folder


def test_a_second_question_of_the_same_rows_is_told_with_its_price(tmp_path):
  for _ in range(2):  # the same again
    assert ledger.record(tmp_path, QUESTION, ROWS, 0.05) == ""
  (line,) = lines(tmp_path)
  assert line["count"] == 200 and len(line["rows"]) == 64
  assert line["when"].startswith("20") and line["question"] == QUESTION
  said = ledger.record(tmp_path, OTHER, ROWS, 0.05)
  assert "textual, rouge_l within 0.1 at 0.05 on 200 rows" in said and "up to 0.1," in said
  assert "each of the 2 again with --error_rate=0.025" in said
  # The way out is taken: nothing more is asked for.
  said = ledger.record(tmp_path, QUESTION, ROWS, 0.025)
  assert "up to 0.075" in said and "--error_rate=0.025" in said
  said = ledger.record(tmp_path, OTHER, ROWS, 0.025)
  assert "up to 0.05, the sum of their error rates." in said and "again" not in said
  assert len(lines(tmp_path)) == 4


def test_more_prompts_count_and_other_prompts_do_not(tmp_path):
  few, more, other = (tmp_path / name for name in ("few", "more", "other"))
  for folder in (few, more, other):
    folder.mkdir()
  assert ledger.record(few, QUESTION, ROWS[:50], 0.05) == ""
  assert ledger.record(other, QUESTION, [f"other {row}" for row in range(200)], 0.05) == ""
  said = ledger.record(more, QUESTION, ROWS, 0.05)
  assert "on 50 rows" in said and "on 200 rows" not in said and "up to 0.1," in said
  assert "on 50 rows" in ledger.record(tmp_path, QUESTION, ROWS[:100], 0.05)


def test_fits_and_caches_share_one_ledger_that_twins_do_not_escape(tmp_path):
  fits = {name: tmp_path / name / "fit" for name in ("mine", "yours")}
  for work in (*fits.values(), cache := tmp_path / "cache"):
    work.mkdir(parents=True)

  def fit(name, rows=ROWS, **options):
    asked, around = {**QUESTION, ledger.FIT: name}, [tmp_path / name]
    return ledger.record(tmp_path / name / "fit", asked, rows, 0.05, around=around, **options)

  assert fit("mine", only_look=True) == "" and not (fits["mine"] / ledger.LEDGER).exists()
  assert fit("mine") == fit("mine") == ""  # a fit goes on
  said = fit("yours", [f"{row.upper()} !" for row in ROWS])
  assert f"{tmp_path / 'mine'} within 0.1 at 0.05 on 200 rows" in said
  said = ledger.record(cache, QUESTION, ROWS, 0.05)
  assert str(tmp_path / "yours") in said and "each of the 3 again" in said
  assert "textual, rouge_l within" in fit("mine", only_look=True)
  fits["mine"].parent.rename(tmp_path / "moved")  # and is still itself
  said = fit("moved")
  assert "mine" not in said and "each of the 3" in said


def test_what_earlier_versions_wrote_of_a_fit_is_read(tmp_path):
  folder, other = tmp_path / "old" / "fit", tmp_path / "cache"
  folder.mkdir(parents=True), other.mkdir()
  rows = [hashlib.sha256(f"prompt{row}".encode()).hexdigest()[:16] for row in range(200)]
  whole = {"when": "2026-11-30T00:00:00+00:00", **QUESTION, "error_rate": 0.05, "rows": rows}
  (folder / ledger.EARLIER).write_text(json.dumps(whole, indent=1))
  said = ledger.record(other, OTHER, ROWS, 0.05)
  assert f"textual, rouge_l, {tmp_path / 'old'} within 0.1 at 0.05 on 200 rows" in said
  (other / ledger.LEDGER).unlink()
  asked, around = {**QUESTION, ledger.FIT: "old"}, [tmp_path / "old"]
  assert ledger.record(folder, asked, ROWS, 0.05, around=around) == ""  # the same fit goes on


@pytest.mark.parametrize(
  "text",
  [
    "no json\n",
    "{}\n",
    '{"when": 1}\n',
    '{"rows": [1], "question": 2}\n',
    '{"when": "", "question": {}, "error_rate": 5, "count": 1, "rows": []}\n',
    "somebody's list\nwithout an end",
  ],
)
def test_damage_is_named_and_kept_here_and_passed_over_beside(tmp_path, text):
  for name in "ab":
    (tmp_path / name).mkdir()
  (tmp_path / "a" / ledger.LEDGER).write_text(text)
  with pytest.raises(GenerationsError, match=r"calibrations\.jsonl:1"):
    ledger.record(tmp_path / "a", QUESTION, ROWS, 0.05)
  assert (tmp_path / "a" / ledger.LEDGER).read_text() == text
  assert ledger.record(tmp_path / "b", QUESTION, ROWS, 0.05) == ""


def test_a_line_that_was_cut_off_is_dropped_and_nothing_is_waited_for_or_followed(tmp_path):
  ledger.record(tmp_path, QUESTION, ROWS, 0.05)
  path = tmp_path / ledger.LEDGER
  path.write_text(path.read_text() + '{"when": "20')
  assert ledger.record(tmp_path, OTHER, ROWS, 0.05) != ""
  assert len(lines(tmp_path)) == 2
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(ValueError, match="to be a regular file"):
    ledger.record(tmp_path, QUESTION, ROWS, 0.05)
  path.unlink()
  path.symlink_to(tmp_path / "elsewhere")
  with pytest.raises(OSError):
    ledger.record(tmp_path, QUESTION, ROWS, 0.05)
  assert not (tmp_path / "elsewhere").exists()
