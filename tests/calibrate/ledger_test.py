"""The ledger of calibrations: what was asked of the same prompts, and what that costs."""

import json

import pytest

from calm.calibrate import GenerationsError, calibrate, ledger
from tests.calibrate import laws

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


@pytest.mark.parametrize(
  "text",
  [
    "{}\n",
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


def test_a_calibration_is_kept_beside_its_generations(tmp_path):
  kept = lambda rate: ledger.keep(
    tmp_path,
    calibrate([[0.0]] * 200, [0.5], tolerance=rate, error_rate=0.05),
    laws.prompts(200),
  )
  assert kept(0.1) == "" and "of the 2 again" in kept(0.2)
  assert lines(tmp_path)[0]["question"]["promise"] == {"name": "mean"}
  (tmp_path / ledger.LEDGER).write_text("{}\n")
  assert kept(0.3).startswith("This calibration could not be recorded: ")


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
  ledger.record(tmp_path, QUESTION, ROWS, 0.05)
  path = tmp_path / ledger.LEDGER
  path.write_text(path.read_text() + '{"when": "20')
  assert ledger.record(tmp_path, OTHER, ROWS, 0.05) != ""
  assert len(lines(tmp_path)) == 2
