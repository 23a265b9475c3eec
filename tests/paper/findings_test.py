"""Titles and headlines turn with the numbers that they are made from."""

import dataclasses
import math

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.exits import schedules
from calm.paper import findings, sections
from tests.paper import samples


def with_gains(**change):
  gains = samples.report().gains
  return samples.changed(gains=tuple(dataclasses.replace(cell, **change) for cell in gains))


@pytest.mark.parametrize(
  ("change", "speed", "words"),
  [
    (
      {},
      "×1.82",
      "Summaries: decodes ×1.82 as fast (1.82 to 1.82); drift 0.0"
      ", where 0.1 was promised (softmax, threshold 0.6, 12 unseen prompts).",
    ),
    ({"risk": 0.3, "risk_interval": (0.05, 0.5)}, "×1.82", "cannot tell the two apart."),
    ({"risk": 0.3, "risk_interval": (0.28, 0.5)}, "×1.82", "do not rely on it."),
    (
      {"speedup": 0.8},
      "×1",
      "full depth serves best here, the fastest that is certified runs ×0.80",
    ),
    ({"threshold": schedules.NEVER_EXIT}, "×1", "nothing faster was certified."),
    ({"speedup": math.nan}, "×1", "full depth serves best"),
  ],
)
def test_the_headline_has_speed_drift_promise_and_their_intervals(change, speed, words):
  word, sentence = findings.headline(with_gains(**change))
  assert word == speed and all(part in sentence for part in words.split(", "))
  assert (sentence[-9:] == "prompts).") == (not change)  # nothing to remark


def test_a_risk_above_the_promise_is_marked():
  few = with_gains(risk=0.3, risk_interval=(0.05, 0.5))
  (section,) = sections.sections([few], ["gains"])
  table = section.tables[0]
  marked = [row for row in table.rows if any("▲" in cell for cell in row)]
  assert len(marked) == len(table.rows) and "▲: 12 of 12 measured risks are above" in table.note
  assert "in 3 of them the whole interval is" in table.note  # δ = 0.02, of the signed loss
  (quiet,) = sections.sections([samples.report()], ["gains"])
  assert "No measured risk is above its δ." in quiet.tables[0].note


def test_titles_of_figure_3_are_its_numbers():
  found = samples.report().tradeoff
  *others, full = found.points
  kept = [
    p.layers for p in others if p.name in samples.MEASURES and p.quality >= 0.98 * full.quality
  ]
  title = findings.quality_and_layers(samples.report())
  assert title.endswith(f"keeps 98% of the ROUGE-L with {min(kept):.1f} of 4 layers")
  seconds = findings.quality_and_seconds(samples.report())
  assert seconds.endswith("of the ROUGE-L up to ×1.82 as fast (1.8 to 1.8)")
  better = (*others, dataclasses.replace(full, quality=2.0))
  none = samples.changed(tradeoff=dataclasses.replace(found, points=better))
  assert "no measure keeps" in findings.quality_and_layers(none)
  assert "nothing that keeps" in findings.quality_and_seconds(none)


def test_schedules_are_compared_where_their_texts_are_close():
  found = samples.report().decay
  title = findings.schedules_compared(found, "summaries")
  assert "layers for 95% of the full model's text: constant 2.3, " in title
  far = tuple(dataclasses.replace(point, similarity=0.9) for point in found.points)
  few = dataclasses.replace(found, points=far)
  assert "constant never, decaying" in findings.schedules_compared(few, "summaries")


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
  found = samples.wrong_tokens(first, last, error).curves["sampling-based"]
  assert says in findings.perturbed(found, "summaries")
