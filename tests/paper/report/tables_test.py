"""The pure parts of the experiments on made-up generations, against numbers by hand."""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs the extra 'decode'")

from calm.calibrate import Record, default_grid
from calm.exits import schedules
from calm.inference import timing
from calm.paper.bench import grids, scores, tasks
from calm.paper.experiments import (
  claims,
  decay,
  examples,
  gains,
  lengths,
  perturbations,
  tradeoff,
)
from tests.paper.report import samples
from tests.paper.report.samples import GRID, MEASURES, NUM_LAYERS


@pytest.fixture(scope="module")
def report():
  return samples.report()


def test_scores_by_hand():
  full = [samples.record(i, 4) for i in range(4)]
  early = [samples.record(i, 2, wrong=i == 0) for i in range(4)]
  scored = scores.score(early, [(r.prediction,) for r in full], full, "rouge_l", bleu=True)
  # The first output lacks its last of four words: precision 1, recall 3/4.
  assert scored.similarity == scored.quality == pytest.approx((6 / 7 + 3) / 4)
  layers = [layer for record in early for layer in record.exit_layers]
  assert scored.layers == pytest.approx(sum(layers) / len(layers))
  assert scored.tokens == len(layers) / 4 and 0 < scored.bleu < 100
  assert math.isnan(scores.score(early, [("x",)] * 4, full, "rouge_l").bleu)


def test_lengths_by_hand():
  made = lengths.lengths(["a b", "a b c d"], ["x"] * 4 + ["x x x"], ["a"], str.split, 3)
  assert made.references == lengths.Length(2, 3.0, 2.1, 3.9)
  assert str(made.references) == "3 (2 - 4)" and made.cut_inputs == pytest.approx(0.2)


def test_a_grid_has_points_where_confidences_lie():
  refused = tuple(np.linspace(0.951, 0.999, 49).tolist())
  count = len(refused)
  record = Record("p", "t", (3,) * count, (4,) * count, (0.0,) * count, refused)
  made = np.array(grids.from_validation([record], "classifier", points=4))
  assert np.all(np.diff(made) < 0) and set(default_grid("classifier")) <= set(made)
  between = made[made > 0.95]
  assert between == pytest.approx(np.quantile(refused, [0.8, 0.6, 0.4, 0.2]))
  with pytest.raises(ValueError, match="records with `rejected_confidences`"):
    grids.from_validation([Record("p", "t")], "classifier")


def test_the_tradeoff_has_every_curve_and_its_seconds(report):
  found = report.tradeoff
  assert [curve.name for curve in found.curves] == [*MEASURES, "static", "oracle"]
  softmax = found.curve("softmax")
  assert [p.threshold for p in softmax.points] == list(GRID)
  assert [p.seconds for p in softmax.points] == pytest.approx([3.3e-3, 2.2e-3, 1.1e-3])
  assert softmax.points[0].scores.similarity == 1.0
  assert softmax.points[2].scores.similarity < softmax.points[1].scores.similarity < 1.0
  depths = [p.scores.layers for p in found.curve("static").points]
  assert depths[0] == 4 and depths == sorted(depths, reverse=True)
  assert softmax.points[1].speedup_interval == pytest.approx((4 / 2.2, 4 / 2.2))
  assert found.full.speedup == 1.0 and found.num_timed == 3 and found.num_prompts == 60
  assert found.curve("missing") is None


def test_gains_calibrate_on_one_part_and_look_at_the_other(report):
  found = report.gains
  assert (found.num_calibration, found.num_unseen, found.num_timed) == (48, 12, 3)
  assert len(found.rows) == len(gains.TARGETS) * len(MEASURES)
  row = next(r for r in found.rows if r.target == gains.Target("textual", 0.1))
  paper, auto = row.gains
  assert (paper.method, auto.method) == ("paper", "betting_fixed_level")
  assert auto.threshold == 0.6 and 0 < auto.risk < 0.1
  cached = samples.cached()
  exits = [r.exit_layers for r in cached.records[1][48:]]
  assert auto.layers == pytest.approx(sum(map(sum, exits)) / sum(map(len, exits)))
  assert auto.speedup == pytest.approx(4 / 2.2) and auto.flops_reduction == 1.5
  assert auto.speedup_interval == pytest.approx((4 / 2.2, 4 / 2.2))  # all prompts alike
  assert auto.risk_interval[0] <= auto.risk < auto.risk_interval[1] < 0.5


def test_risk_is_clipped_for_the_paper_and_signed_for_the_bettor(report):
  row = next(r for r in report.gains.rows if r.target.consistency == "risk")
  assert [gain.kind for gain in row.gains] == ["risk_clipped", "risk_signed"]


def test_nothing_certified_is_the_full_model():
  few = samples.cached(5)
  (row,) = gains.gains(
    {"softmax": few}, NUM_LAYERS, "rouge_l", targets=[gains.Target("textual", 0.1)]
  ).rows
  for gain in row.gains:
    assert gain.threshold == schedules.NEVER_EXIT and "too few" in gain.reason
    assert (gain.layers, gain.risk) == (NUM_LAYERS, 0.0)
    assert math.isnan(gain.flops_reduction)  # no formula was given
  timed = gains.with_times(
    gains.gains({"softmax": few}, NUM_LAYERS, "rouge_l"), samples.timings()
  )
  assert {gain.speedup for row in timed.rows for gain in row.gains} == {1.0}


def test_examples_show_distance_risk_and_layers(report):
  shown = report.examples[0]
  assert shown.thresholds[shown.chosen] == 0.6
  first = shown.items[0]
  above, _, below = first.levels
  assert first.reference == first.full + " more" and above.distance == 0.0
  words = len(first.full.split())
  # One word of `words` is lost.
  assert below.distance == pytest.approx(1 - 2 * (words - 1) / (2 * words - 1))
  assert below.risk_difference > 0 and above.risk_difference == 0.0
  assert below.layers == pytest.approx((4 + words - 1) / words)
  assert above.pieces[-1] == "⏎"
  assert shown.certified == examples.Certified(0.6, 0.25, 0.05)


def test_examples_are_taken_in_order_from_those_that_change():
  cached = samples.cached()
  among = {f"p{i}" for i in range(1, 30)}
  assert examples.choose(cached, 3, among) == (2, 4, 6)
  assert examples.choose(cached, 2, {"p1", "p3"}) == (1, 3)
  assert examples.choose(cached, 2, among, max_tokens=4) == ()


def test_schedules_are_three_different_things():
  made = {name: schedule for name, schedule in decay.kinds(10).items()}
  values = {
    name: [float(schedule(np.float32(0.5), np.int32(t))) for t in (0, 9)]
    for name, schedule in made.items()
  }
  assert values["constant"] == [0.5, 0.5]
  assert values["decaying, τ = 0"] == pytest.approx([0.55, 0.55])
  assert values["decaying, τ = 4"] == pytest.approx([0.55, 0.45 + 0.1 * math.exp(-3.6)])
  assert decay.search_grid(0.25) == (0.75, 0.5, 0.25)


def test_the_shown_schedules_are_the_ones_decoded_with(report):
  constant, level, fast = report.decay.values
  assert constant.values == pytest.approx([0.8] * 8)
  assert level.values == pytest.approx([0.82] * 8)
  assert fast.values[0] == pytest.approx(0.82) and fast.values[-1] < 0.73
  assert len(fast.values) == report.decay.max_length
  curve = report.decay.curves[0]
  assert decay.reachable_layers(curve, 0.99) < NUM_LAYERS
  assert math.isnan(decay.reachable_layers(curve, 1.1))


def test_positions_reach_as_far_as_a_quarter_of_the_outputs():
  records = [Record(f"p{i}", "t", (3,) * n) for i, n in enumerate((2, 4, 8, 8))]
  assert perturbations.positions(records) == tuple(range(8))
  assert perturbations.positions(records, most=3) == (0, 3, 7)


def test_validity_has_both_figures_for_every_measure_and_method(report):
  entries = report.validity.trials
  assert [(e.measure, e.method) for e in entries] == [
    (measure, method) for measure in MEASURES for method in ("paper", "auto")
  ]
  for entry in entries:
    assert [split.tolerance for split in entry.splits] == [0.05, 0.2]
    assert all(trial.trials == 10 for trial in entry.validity)
    assert entry.splits[1].layers_mean < NUM_LAYERS


def test_every_claim_says_something(report):
  for claim in claims.CLAIMS:
    finding = claim.check(report)
    assert finding.found and finding.agrees in (True, False, None)
  found = {claim.text.split(" (")[0]: claim.check(report).agrees for claim in claims.CLAIMS}
  assert found["Copying projected K and V fails"] is False  # the sample copies without harm
  assert found["Up to three times as fast"] is True


def test_a_claim_turns_with_its_numbers(report):
  promise = claims.CLAIMS[-1]
  assert promise.check(report).agrees is True
  entry = report.validity.trials[0]
  broken = dataclasses.replace(entry.validity[0], share=0.6, interval=(0.3, 0.9))
  entry = dataclasses.replace(entry, validity=(broken,))
  validity = dataclasses.replace(report.validity, trials=(entry,))
  assert promise.check(dataclasses.replace(report, validity=validity)).agrees is False


def test_tasks_go_by_their_names_and_their_ends():
  assert tasks.task("qa") is tasks.task("debian_qa")
  assert tasks.task("enfr").metric == "chrf" and tasks.task("enfr").bleu
  with pytest.raises(ValueError, match=r"to be a task of .*debian_enfr.* got 'squad'"):
    tasks.task("squad")


def test_prompts_are_one_a_source_in_a_drawn_order(tmp_path):
  folder = tmp_path / "debian_qa"
  folder.mkdir()
  rows = [
    f'{{"id": "q{i}", "source": "s{i // 3}", "input": "i", "target": ["t"]}}\n'
    for i in range(30)
  ]
  (folder / "test.jsonl").write_text("".join(rows))
  settings = tasks.task("qa")
  all_of_them = tasks.read_prompts(tmp_path, settings, "test")
  assert sorted(p.group for p in all_of_them) == sorted(f"s{i}" for i in range(10))
  assert [p.id for p in all_of_them] != sorted(p.id for p in all_of_them)
  assert tasks.read_prompts(tmp_path, settings, "test", limit=4) == all_of_them[:4]
  assert tasks.read_prompts(tmp_path, settings, "test", seed=1) != all_of_them


def test_timings_are_found_by_name_and_threshold():
  timings = samples.timings()
  assert timings.find("softmax", 0.6).layers == 2
  assert timings.find("softmax", 0.61) is None
  assert timings.find(tradeoff.static_name(2)).speedup == 2.0
  assert timings.find(timing.FULL).end_to_end == 1.0
