"""Rows of any format into parts: by group, the same for the same seed, refused
if too few.
"""

import json

import pytest

from calm.calibrate import Prompt
from calm.data import prompt_files
from calm.fitting import request


def rows(count, per_group=1):
  return [
    Prompt(f"r{i}", f"text {i}", (f"target {i}",), f"g{i // per_group}")
    for i in range(count)
  ]


def split(given, trains=True, **options):
  """Five prompts certify at least."""
  return request.split(
    given, request.FitOptions(**{"tolerance": 0.5, **options}), trains
  )


def names(part):
  return {row.group for row in part}


@pytest.mark.parametrize("trains", [True, False])
def test_no_group_is_in_two_parts_and_those_that_measure_have_one_row_a_group(
  trains,
):
  made = split(rows(400, per_group=2), trains)
  parts = [names(getattr(made, name)) for name in request.PARTS]
  assert (
    sum(map(len, parts)) == len(set().union(*parts)) and made.num_groups == 200
  )
  for name in request.PARTS[1:]:
    part = getattr(made, name)
    assert len(names(part)) == len(part) >= 5
  assert len(made.train) == (2 * len(names(made.train)) if trains else 0)
  assert bool(made.train) == trains
  if trains:
    assert set().union(*parts) == names(rows(400, per_group=2))


def test_the_draw_is_the_seeds_and_not_the_order_of_the_file():
  given = rows(120)
  made = split(given)
  again = split(given[::-1])

  def ids(s):
    return [{row.id for row in getattr(s, name)} for name in request.PARTS]

  assert ids(made) == ids(again)
  assert made.calibration == again.calibration
  assert ids(made) != ids(split(given, seed=1))


def test_twins_but_for_case_and_punctuation_stay_in_one_part():
  given = rows(100)
  twins = []
  for i in range(100):
    text = f"text {i}"
    wide = text.replace("t", "\uff54")
    marks = f" \u201c{text.replace(' ', ', ')}!\u201d  "
    twin = (marks, text.upper(), wide, "-".join(text.split()))[i % 4]
    twins.append(Prompt(f"t{i}", twin, ("other",), f"h{i}"))
  made = split([*given, *twins])
  assert (made.num_repeats, made.num_groups) == (100, 100)
  assert "100 repeat another's input" in str(made)
  parts = [
    {row.id[1:] for row in getattr(made, name)} for name in request.PARTS
  ]
  assert sum(map(len, parts)) == len(set().union(*parts)) == 100


def test_the_population_is_named():
  large = [Prompt(f"l{i}", f"large {i}", ("x",), "docs") for i in range(100)]
  said = split([*large, *rows(100)]).population
  assert "one row of each of 101 groups" in said and "of the 200 rows" in said
  assert "group" not in split(rows(100)).population


@pytest.mark.parametrize(("trains", "needed"), [(True, 70), (False, 35)])
def test_too_few_rows_say_how_many_are_needed(trains, needed):
  # 5 to calibrate, 20 to choose, 10 to look at; as many again to train.
  with pytest.raises(
    ValueError, match=rf"at least {needed} rows .*got {needed - 1}"
  ):
    split(rows(needed - 1), trains)
  made = split(rows(needed), trains)
  assert (
    len(made.calibration) >= 5
    and len(made.validation) == 20
    and len(made.last) == 10
  )
  with pytest.raises(ValueError, match=r"29 to calibrate on.*got 1;"):
    split(rows(1), trains, tolerance=0.1)


def test_what_is_written_is_read_by_training(tmp_path):
  made = split(rows(80))
  request.write(tmp_path, made)
  for name in request.PARTS:
    read = prompt_files.open_prompts(tmp_path / f"{name}.jsonl")
    assert read == getattr(made, name)
  line = json.loads((tmp_path / "last.jsonl").read_text().splitlines()[0])
  assert set(line) == {"id", "source", "input", "target"}
