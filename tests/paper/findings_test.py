"""Titles and headlines turn with the numbers that they are made from."""

import dataclasses
import math

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.exits import schedules
from calm.paper import findings, perturbations, sections
from tests.paper import samples


@pytest.fixture(scope="module")
def report():
  return samples.report()


def with_gains(report, **change):
  cells = tuple(dataclasses.replace(cell, **change) for cell in report.gains.cells)
  return dataclasses.replace(report, gains=dataclasses.replace(report.gains, cells=cells))


def test_the_headline_has_speed_drift_promise_and_their_intervals(report):
  text = findings.headline(report)
  assert text.startswith("Summaries: decodes ×1.82 as fast (1.82 to 1.82); drift 0.0")
  assert " where 0.1 was promised (softmax, threshold 0.6, 12 unseen prompts)." in text
  assert text.endswith("prompts).")  # nothing to remark


def test_a_risk_above_the_promise_is_remarked(report):
  worse = lambda low: with_gains(report, risk=0.3, risk_interval=(low, 0.5))
  few = worse(0.05)
  assert "so few prompts cannot tell the two apart" in findings.headline(few)
  assert "do not rely on it" in findings.headline(worse(0.28))
  table, _ = sections.section("gains", [few]).tables
  marked = [row for row in table.rows if any("▲" in cell for cell in row)]
  assert len(marked) == len(table.rows) and "▲: 12 of 12 measured risks are above" in table.note
  assert "in 3 of them the whole interval is" in table.note  # δ = 0.02, of the signed loss
  quiet, _ = sections.section("gains", [report]).tables
  assert "No measured risk is above its δ." in quiet.note


def test_where_nothing_is_faster_full_depth_is_said_to_be_best(report):
  slow = with_gains(report, speedup=0.8)
  assert findings.headline(slow).startswith("Summaries: full depth serves best here")
  assert "the fastest that is certified runs ×0.80 as fast" in findings.headline(slow)
  never = with_gains(report, threshold=schedules.NEVER_EXIT)
  assert findings.best_gain(never.gains) is None
  assert findings.headline(never).endswith("nothing faster was certified.")
  untimed = with_gains(report, speedup=math.nan)
  assert "full depth serves best" in findings.headline(untimed)


def test_titles_of_figure_3_are_its_numbers(report):
  found = report.tradeoff
  title = findings.quality_and_layers(found, "summaries", "ROUGE-L", 4)
  kept = [
    point.layers
    for point in found.points
    if point.name in samples.MEASURES
    and point.quality >= 0.98 * found.first("full model").quality
  ]
  assert title.endswith(f"keeps 98% of the ROUGE-L with {min(kept):.1f} of 4 layers")
  seconds = findings.quality_and_seconds(found, "summaries", "ROUGE-L")
  assert seconds.endswith("of the ROUGE-L up to ×1.82 as fast (1.8 to 1.8)")
  *others, full = found.points
  better = dataclasses.replace(full, quality=2.0)
  none = dataclasses.replace(found, points=(*others, better))
  assert "no measure keeps" in findings.quality_and_layers(none, "summaries", "ROUGE-L", 4)
  assert "nothing that keeps" in findings.quality_and_seconds(none, "summaries", "ROUGE-L")


def test_schedules_are_compared_where_their_texts_are_close(report):
  found = report.decay
  assert "the full model's text, schedules need as many layers (constant" in (
    findings.schedules_compared(found, "summaries")
  )
  far = [dataclasses.replace(point, similarity=0.9) for point in found.points]
  few = dataclasses.replace(found, points=tuple(far))
  assert "too few points reach 95%" in findings.schedules_compared(few, "summaries")


@pytest.mark.parametrize(
  ("first", "last", "error", "says"),
  [
    (0.5, 0.9, 0.05, "an early wrong token costs more (50 against 90 of 100 stay)"),
    (0.9, 0.5, 0.05, "an early wrong token costs less"),
    (0.5, 0.6, 0.05, "costs about as much wherever it stands"),
    (0.5, 0.9, math.nan, "costs about as much wherever it stands"),
  ],
)
def test_titles_of_wrong_tokens_heed_their_errors(first, last, error, says):
  points = tuple(
    perturbations.Position(at, 60, 0.5, value, 0.5, 0.6, error)
    for at, value in ((0, first), (9, last))
  )
  found = perturbations.Perturbations("rouge_l", 60, points, points)
  assert says in findings.perturbed(found, "summaries")
