"""The experiments on made-up generations, against numbers by hand, and the
headline.
"""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.calibrate import Prompt, Record, default_grid
from calm.exits import schedules
from calm.paper import bench, experiments, sections
from tests.paper import samples
from tests.paper.samples import GRID, MEASURES, NUM_LAYERS


@pytest.fixture(scope="module")
def report():
  return samples.report()


def test_scores_by_hand():
  full = [samples.record(i, 4) for i in range(4)]
  early = [samples.record(i, 2, wrong=i == 0) for i in range(4)]
  prompts = [Prompt(r.id, r.id, (r.prediction,)) for r in full]
  scored = experiments.point(
    "softmax", early, full, prompts, "rouge_l", bleu=True
  )
  # The first output lacks its last of four words: precision 1, recall 3/4.
  assert scored.similarity == scored.quality == pytest.approx((6 / 7 + 3) / 4)
  layers = [layer for record in early for layer in record.exit_layers]
  assert scored.layers == pytest.approx(sum(layers) / len(layers))
  assert (
    scored.identical == 0.75
    and 0 < scored.bleu < 100
    and math.isnan(scored.seconds)
  )


def test_a_grid_has_points_where_confidences_lie():
  refused = tuple(np.linspace(0.951, 0.999, 49).tolist())
  count = len(refused)
  record = Record("p", "t", (3,) * count, (4,) * count, (0.0,) * count, refused)
  grid = np.array(bench.grid_of([record], "classifier", points=4))
  assert np.all(np.diff(grid) < 0) and set(default_grid("classifier")) <= set(
    grid
  )
  assert grid[grid > 0.95] == pytest.approx(
    np.quantile(refused, [0.8, 0.6, 0.4, 0.2])
  )


def test_the_tradeoff_has_every_curve_and_its_seconds(report):
  found = report.tradeoff
  assert [*found.curves] == [*MEASURES, "static", "oracle", "full model"]
  softmax = found.curves["softmax"]
  static = found.curves["static"]
  assert [p.threshold for p in softmax] == list(GRID)
  assert [p.seconds for p in softmax] == pytest.approx([3.3e-3, 2.2e-3, 1.1e-3])
  similarity = [p.similarity for p in softmax]
  assert 1.0 == similarity[0] > similarity[1] > similarity[2]
  assert [p.seconds for p in static] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
  assert softmax[1].speedup_interval == pytest.approx((4 / 2.2, 4 / 2.2))
  assert (found.num_timed, found.num_prompts) == (3, 60)


def test_gains_calibrate_on_one_part_and_measure_on_the_other(report):
  assert (report.num_calibration, len(report.unseen)) == (48, 12)
  assert len(report.gains) == len(experiments.TARGETS) * len(MEASURES) * 2
  auto = report.gains[1]
  named = auto.consistency, auto.tolerance, auto.measure, auto.method
  assert named == ("textual", 0.1, "softmax", "auto")
  assert auto.threshold == 0.6 and 0 < auto.risk < 0.1
  exits = [r.exit_layers for r in samples.cached().records[1][48:]]
  assert auto.layers == pytest.approx(
    sum(map(sum, exits)) / sum(map(len, exits))
  )
  assert auto.speedup == pytest.approx(4 / 2.2) and auto.flops_reduction == 1.5
  assert auto.risk_interval[0] <= auto.risk < auto.risk_interval[1] < 0.5
  few = samples.sample(5)  # nothing is certified: the full model
  assert dict(few.examples[0].promised)[0.25] == 0
  for gain in few.gains:
    assert gain.threshold == schedules.NEVER_EXIT and not gain.exits
    assert (gain.layers, gain.risk, gain.speedup) == (NUM_LAYERS, 0.0, 1.0)


def test_examples_show_distance_risk_and_layers():
  shown = samples.sample().examples[0]
  assert shown.thresholds == (schedules.NEVER_EXIT, *GRID)
  promised = dict(shown.promised)
  assert list(promised) == list(experiments.TOLERANCES) == sorted(promised)
  # 48 prompts
  assert (promised[0.02], promised[0.1], promised[0.5]) == (0, 2, 3)
  first = shown.items[0]
  full, above, _, below = first.levels
  assert full.distance == 0.0 and set(full.exit_layers) == {NUM_LAYERS}
  assert first.reference == first.full + " more" and above.distance == 0.0
  words = len(first.full.split())
  # One word of `words` is lost.
  assert below.distance == pytest.approx(1 - 2 * (words - 1) / (2 * words - 1))
  assert below.risk_difference > 0 and above.risk_difference == 0.0
  assert (
    below.layers == pytest.approx((4 + words - 1) / words)
    and above.pieces[-1] == "⏎"
  )


def test_schedules_are_three_different_things():
  values = experiments.schedule_values(10)
  assert values["constant"] == pytest.approx([0.8] * 10)
  assert values["decaying, τ = 0"] == pytest.approx([0.82] * 10)
  fast = values["decaying, τ = 4"]
  assert (fast[0], fast[-1]) == pytest.approx(
    (0.82, 0.72 + 0.1 * math.exp(-3.6))
  )


def test_prompts_are_one_a_source_in_a_drawn_order(tmp_path):
  (tmp_path / "debian_qa").mkdir()
  row = '{{"id": "q{}", "source": "s{}", "input": "i", "target": ["t"]}}\n'
  text = "".join(row.format(i, i // 3) for i in range(30))
  (tmp_path / "debian_qa" / "test.jsonl").write_text(text)
  every = bench.read_prompts(tmp_path, bench.task("qa"), "test")
  assert sorted(p.group for p in every) == sorted(f"s{i}" for i in range(10))
  assert [p.id for p in every] != sorted(p.id for p in every)
  assert (
    bench.read_prompts(tmp_path, bench.task("qa"), "test", limit=4) == every[:4]
  )


# ---- Headlines


@pytest.mark.parametrize(
  ("change", "speed", "words"),
  [
    (
      {},
      "×1.82",
      "Summaries: decodes ×1.82 as fast (1.82 to 1.82); drift 0.0"
      ", where 0.1 was promised (softmax, threshold 0.6, 12 unseen prompts).",
    ),
    (
      {"risk": 0.3, "risk_interval": (0.05, 0.5)},
      "×1.82",
      "by less than so few prompts",
    ),
    (
      {"risk": 0.3, "risk_interval": (0.28, 0.5)},
      "×1.82",
      "do not rely on it.",
    ),
    (
      {"speedup": 0.8},
      "×1",
      "full depth serves best here, that is certified runs ×0.80",
    ),
    (
      {"threshold": schedules.NEVER_EXIT},
      "×1",
      "nothing faster was certified.",
    ),
  ],
)
def test_the_headline_has_speed_drift_promise_and_their_intervals(
  report, change, speed, words
):
  gains = tuple(dataclasses.replace(cell, **change) for cell in report.gains)
  made = samples.changed(gains=gains)
  word, sentence = sections.headline(made)
  assert word == speed and all(part in sentence for part in words.split(", "))
  assert (sentence[-9:] == "prompts).") == (not change)  # nothing to remark
  (section,) = sections.sections([made], ["gains"])
  table = section.tables[0]
  above = "risk" in change
  marked = [row for row in table.rows if any("▲" in cell for cell in row)]
  assert len(marked) == above * len(table.rows)
  assert f"▲: {12 * above} of 12 measured risks are above" in table.note
