"""Grids decoded and certified before serving (`Predictor.calibrate`) or while
serving (`Predictor.online`), and the seconds that are measured beside full
depth.
"""

import contextlib
import dataclasses

import numpy as np
import pytest

from calm import calibrate, exits, inference
from calm.calibrate import NEVER_EXIT, Prompt, Record
from calm.calibrate import losses as sequence_losses
from calm.decode import compiled
from calm.exits import schedules
from calm.inference import grid, timing
from tests.inference import predictor_test

# A toy's seconds are noise.
pytestmark = pytest.mark.filterwarnings(
  "ignore::calm.inference.SlowerThanFullDepth",
  "ignore:.*prompts have more than",
)
TEXTS = [f"{word} {i}" for i in range(12) for word in ("a", "the words")]
RATES = {"tolerance": 0.9, "thresholds": [0.9, 0.5]}
# Prompts of two padded lengths, over a grid.
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(predictor_test.TEXTS)]
GRID = [0.9, 0.6, 0.3]
# Lenient: losses of a toy are large.
ONLINE = {"tolerance": 0.8, "error_rate": 0.3, "thresholds": GRID}


@pytest.fixture(scope="module")
def model(directory):
  return inference.load(
    directory, **{**predictor_test.OPTIONS, "max_input_length": 32}
  )


def test_a_model_calibrates_itself_on_texts(model):
  told = []
  served = model.calibrate(
    TEXTS, **RATES, progress=lambda *where: told.append(where)
  )
  calibration = served.calibration
  assert calibration.procedure == model.procedure and calibration.certified
  measured = timing.noted(calibration)
  assert measured.single.num_prompts == 8 and measured.single.full > 0
  assert calibration.num_examples == len(TEXTS) and calibration.tolerance == 0.9
  assert [row.threshold for row in calibration.rows] == [0.9, 0.5]
  outputs = served.generate(TEXTS[:4])
  assert outputs.threshold == calibration.threshold
  assert outputs.guarantee == calibration.guarantee
  shares = [share for share, _ in told]
  assert (
    shares == sorted(shares)
    and shares[0] > 0.0
    and shares[-1] == pytest.approx(1.0)
  )
  assert any("batch 2 of 6, threshold 0.9" in text for _, text in told)


@pytest.mark.parametrize(
  ("texts", "options", "message"),
  [
    (TEXTS[:5], {"tolerance": 0.1}, "Expected at least 22 prompts"),
    (
      [text + " " * i for text in TEXTS[:20] for i in range(5)],
      {"tolerance": 0.1},
      "at least 22 clusters of prompts .*got 20",
    ),
    (
      TEXTS,
      {"tolerance": 0.9, "consistency": "risk"},
      "references .*24 without",
    ),
    (
      TEXTS,
      {"tolerance": 0.9, "consistency": "textul"},
      "`consistency` to be one of 'text",
    ),
  ],
)
def test_what_cannot_be_certified_is_refused_before_any_decoding(
  model, monkeypatch, texts, options, message
):
  monkeypatch.setattr(inference.Predictor, "encode", None)
  with pytest.raises(ValueError, match=message):
    model.calibrate(texts, **options)


# ---- Grids from where each sequence changes


def decode(model, monkeypatch, **options):
  """(records by threshold, steps that the loops began at)."""
  begun = []
  records = {}
  resume = inference.Predictor.resume

  def counted(self, encoded, state, active, threshold, resume_at):
    begun.append(resume_at[active].tolist())
    return resume(self, encoded, state, active, threshold, resume_at)

  monkeypatch.setattr(inference.Predictor, "resume", counted)
  grid.generate(model, PROMPTS, GRID, records, **options)
  return records, begun


def test_full_depth_that_is_known_is_not_decoded_nor_taken_over(
  model, monkeypatch
):
  records, _ = decode(model, monkeypatch)
  static = grid.with_rule(model, PROMPTS, exits.StaticExit())
  made, _ = decode(model, monkeypatch, full=static)
  assert made == records | {
    NEVER_EXIT: {record.id: record for record in static}
  }


@pytest.mark.parametrize(
  "schedule", [schedules.Constant(), schedules.Decaying(4.0, 6)]
)
def test_beginnings_are_taken_over_and_the_records_are_the_same(
  model, monkeypatch, schedule
):
  model, made = (
    model.with_options(schedule=schedule),
    compiled.num_made("Program.resume"),
  )
  records, begun = decode(model, monkeypatch)
  # A batch of 4 and one of 2, over the whole grid.
  assert compiled.num_made("Program.resume") - made <= 2
  # Meta: some sequence was decoded on from its middle.
  assert sum(at for batch in begun for at in batch) > 0
  for threshold, made in records.items():
    for plain in grid.with_rule(model, PROMPTS, threshold=threshold):
      reused = made[plain.id]
      assert (reused.tokens, reused.exit_layers) == (
        plain.tokens,
        plain.exit_layers,
      )
      for name in ("confidences", "rejected_confidences"):
        got = getattr(reused, name)
        expected = getattr(plain, name)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_reuse_by_hand():
  row = Record("a", "x", [5, 6, 1], [2, 8, 8], [0.8, 0.0, 0.0], [0.1, 0.5, 0.2])
  for thresholds, kept in (
    ([0.6, 0.6, 0.6, 0.0], 3),  # later values belong to no token
    ([0.5, 0.5, 0.5], 1),  # reaching it is exiting
    ([0.6, 0.6, 0.2], 2),
  ):
    assert grid.reusable_tokens(row, thresholds) == kept
  # Comparisons are in float32, as in the decoder.
  row = Record("a", "x", rejected_confidences=[float(np.float32(0.7))])
  assert grid.reusable_tokens(row, [0.7]) == 0


# ---- While serving


LIVES = [
  f"{word} {i}" for i in range(6) for word in ("some", "words", "to", "read")
]


def test_it_learns_what_a_batch_of_the_same_prompts_would(model, tmp_path):
  path = tmp_path / "state.jsonl"
  online = model.online(path, **ONLINE)
  made = model.generate(LIVES[:12], online=online)
  assert made.threshold == NEVER_EXIT and made.guarantee is None
  assert made.texts == model.generate(LIVES[:12], threshold=NEVER_EXIT).texts
  assert (online.served, online.checked, online.missing) == (12, 12, 0)
  assert online.threshold in GRID  # twelve losses far below 0.8
  named = online.threshold
  made = model.generate(LIVES[12:], online=online)
  assert (
    made.threshold == named
    and made.texts == model.generate(LIVES[12:], threshold=named).texts
  )
  assert (
    "at least 0.7 over the whole life" in made.guarantee and online.served == 24
  )
  # The losses are those of a calibration of these prompts.
  prompts = [Prompt(text, text) for text in LIVES[:12]]
  _, cached = grid.certify(model, prompts, **ONLINE)
  expected = sequence_losses.compute(cached, "textual").values
  again = model.online(None, **ONLINE)
  for text, row in zip(LIVES[:12], expected.tolist(), strict=True):
    assert again.should_check(text)
    again.observe(text, dict(zip(GRID, row, strict=True)))
  assert again.threshold == named
  # It goes on: texts that were seen are not drawn again.
  checked = online.checked
  del online
  online = model.online(path, **ONLINE)
  np.testing.assert_allclose(online.checked, checked)
  model.generate(LIVES[:12], online=online)
  assert online.checked == checked


def test_what_does_not_fit_is_refused(model):
  online = model.online(None, **ONLINE)
  for served, other, message in (
    (model, {"threshold": 0.5}, "`online` needs neither"),
    (model, {"ids": ["a", "b"]}, "`ids` of 1 texts, got 2"),
    (
      model.with_options(max_decode_length=3),
      {},
      "a state of this model under these options",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      served.generate(LIVES[:1], online=online, **other)
  assert online.served == 0


def test_prompts_of_one_id_are_checked_once(model):
  online = model.online(None, **ONLINE)
  model.generate(LIVES[:4], online=online, ids=["a", "a", "b", "a"])
  assert (online.served, online.checked) == (4, 2)


# ---- Seconds


def test_prompts_are_timed_alone_and_in_whole_batches(model):
  told = []
  found = timing.beside_full_depth(
    model.with_options(batch_size=2),
    TEXTS[:6],
    0.6,
    prompts=3,
    rounds=1,
    progress=lambda share, text: told.append(share),
  )
  single = found.single
  batched = found.batched
  assert (single.batch_size, single.num_prompts) == (1, 3)
  assert (batched.batch_size, batched.num_prompts) == (2, 6)
  for pair in (single, batched):
    assert pair.full > 0 and pair.speedup == pytest.approx(
      pair.full / pair.early
    )
    assert min(pair.speedup, 1) <= pair.end_to_end <= max(pair.speedup, 1)
  assert told == sorted(told) and told[-1] == 1.0
  assert (
    timing.beside_full_depth(model, TEXTS[:3], 0.6, rounds=1).batched is None
  )


FAST = timing.Pair(1, 8, full=4.0, early=2.0, speedup=2.0, end_to_end=1.5)
SLOW = dataclasses.replace(FAST, batch_size=8, early=5.0, speedup=0.8)


def calibrated(losses=0.0, **fields):
  table = np.full((200, 2), losses)
  made = calibrate.calibrate(table, [0.9, 0.5], tolerance=0.1, error_rate=0.05)
  return dataclasses.replace(made, **fields)


@pytest.mark.parametrize(
  ("measured", "words"),
  [
    (timing.Seconds(FAST), ""),
    (timing.Seconds(FAST, SLOW), "x0.80 in batches of 8"),
    (
      timing.Seconds(dataclasses.replace(FAST, speedup=1.0), SLOW),
      "x1.00 one at a time and",
    ),
  ],
)
def test_measured_speed_is_kept_and_serving_a_slow_threshold_warns(
  model, directory, tmp_path, measured, words
):
  path = tmp_path / "calibration.json"
  timing.note(calibrated(procedure=model.procedure), measured).save(path)
  read = calibrate.Calibration.load(path)
  assert timing.noted(read) == measured and bool(timing.warning(read)) == bool(
    words
  )
  slow = pytest.warns(inference.SlowerThanFullDepth, match=words)
  with slow if words else contextlib.nullcontext():
    assert inference.load(directory, calibration=path).threshold == 0.5


def test_nothing_is_said_where_nothing_was_measured_or_certified():
  assert (
    timing.noted(calibrated()) is None and timing.warning(calibrated()) == ""
  )
  assert (
    timing.warning(timing.note(calibrated(1.0), timing.Seconds(SLOW))) == ""
  )
  # A note of that name that somebody else wrote.
  for note in ({"single": {"speedup": 0.5}, "batched": None}, "slow"):
    provenance = dataclasses.replace(
      calibrated().provenance, notes={"seconds": note}
    )
    assert timing.noted(calibrated(provenance=provenance)) is None
