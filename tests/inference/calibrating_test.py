"""Grids decoded and certified before serving (`Predictor.calibrate`) or while serving
(`Predictor.online`), and the seconds that are measured beside full depth."""

import collections
import contextlib
import dataclasses

import numpy as np
import pytest

from calm import calibrate, exits, inference
from calm.calibrate import NEVER_EXIT, Prompt, Provenance, Record, generations, ledger
from calm.calibrate import losses as sequence_losses
from calm.decode import compiled
from calm.inference import certified, grid, predictor, timing
from tests.inference import predictor_test

# A toy's seconds are noise.
pytestmark = pytest.mark.filterwarnings(
  "ignore::calm.inference.SlowerThanFullDepth", "ignore:.*prompts have more than"
)
TEXTS = [f"{word} {i}" for i in range(12) for word in ("a", "the words")]
RATES = {"tolerance": 0.9, "thresholds": [0.9, 0.5]}
# Prompts of two padded lengths, over a grid.
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(predictor_test.TEXTS)]
GRID = [0.9, 0.6, 0.3]
# Lenient: losses of a toy are large.
ONLINE = {"tolerance": 0.8, "error_rate": 0.3, "thresholds": GRID}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return predictor_test.save(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def model(directory):
  return inference.load(directory, **{**predictor_test.OPTIONS, "max_input_length": 32})


def test_a_model_calibrates_itself_on_texts(model):
  served = model.calibrate(TEXTS, **RATES)
  calibration = served.calibration
  assert calibration.procedure == model.procedure and calibration.certified
  measured = timing.noted(calibration)
  assert measured.single.num_prompts == 8 and measured.single.full > 0
  assert calibration.num_examples == len(TEXTS) and calibration.tolerance == 0.9
  assert [row.threshold for row in calibration.rows] == [0.9, 0.5]
  outputs = served.generate(TEXTS[:4])
  assert outputs.threshold == calibration.threshold
  assert outputs.guarantee == calibration.guarantee


def test_a_folder_has_a_ledger_that_warns_of_a_second_question(model, tmp_path):
  folder = tmp_path / "runs" / "cache"
  for _ in range(2):
    model.calibrate(TEXTS, **RATES, folder=folder)
  with pytest.warns(UserWarning, match="textual, rouge_l.* within 0.9 at 0.05 on 24 rows"):
    model.calibrate(TEXTS, **RATES, folder=folder, metric="chrf")
  assert len((folder / ledger.LEDGER).read_text().splitlines()) == 2


def test_what_cannot_be_certified_is_refused_before_any_decoding(model, monkeypatch):
  monkeypatch.setattr(inference.Predictor, "encode", None)
  with pytest.raises(ValueError, match="Expected at least 22 prompts"):
    model.calibrate(TEXTS[:5], tolerance=0.1)
  with pytest.raises(ValueError, match=r"at least 22 clusters of prompts .*got 20"):
    model.calibrate([text + " " * i for text in TEXTS[:20] for i in range(5)], tolerance=0.1)
  with pytest.raises(ValueError, match=r"references .*24 without"):
    model.calibrate(TEXTS, tolerance=0.9, consistency="risk")
  with pytest.raises(ValueError, match="`consistency` to be 'textual' or"):
    model.calibrate(TEXTS, tolerance=0.9, consistency="textul")
  with pytest.raises(TypeError, match="put it in a list"):
    model.calibrate("one text", tolerance=0.9)


def test_who_looks_on_sees_all_of_it_and_who_asks_is_told(model, monkeypatch):
  seen = []

  @contextlib.contextmanager
  def looking_on():
    yield lambda share, text: seen.append((share, text))

  monkeypatch.setattr(predictor, "Progress", looking_on)
  model.calibrate(TEXTS, **RATES)
  shares = [share for share, _ in seen]
  assert shares == sorted(shares) and shares[0] > 0.0 and shares[-1] == pytest.approx(1.0)
  assert any("batch 2 of 6, threshold 0.9" in text for _, text in seen)
  assert any(text.startswith("timing ") for _, text in seen)
  told, before = [], len(seen)
  model.calibrate(TEXTS, **RATES, progress=lambda *where: told.append(where))
  assert len(seen) == before and [share for share, _ in told] == shares


# ---- Grids from where each sequence changes


def decode(model, directory, monkeypatch, **options):
  """(what was reused, records by threshold, steps that the loops began at)."""
  begun = []
  resume = inference.Predictor.resume

  def counted(self, encoded, state, active, threshold, resume_at):
    begun.append(resume_at[active].tolist())
    return resume(self, encoded, state, active, threshold, resume_at)

  monkeypatch.setattr(inference.Predictor, "resume", counted)
  provenance = Provenance(grid=tuple(GRID), num_examples=len(PROMPTS))
  writer = generations.open_writer(
    directory,
    prompts=PROMPTS,
    thresholds=GRID,
    procedure=model.procedure,
    provenance=provenance,
  )
  summary = grid.generate(model, PROMPTS, GRID, writer, **options)
  levels = [NEVER_EXIT, *GRID]
  return summary, [writer.completed_records(x) for x in levels], begun


def test_full_depth_that_is_known_is_not_decoded_nor_taken_over(model, tmp_path, monkeypatch):
  _, records, _ = decode(model, tmp_path / "whole", monkeypatch)
  static = grid.with_rule(model, PROMPTS, exits.StaticExit())
  encodings = {}
  options = {"full": static, "encodings": encodings}
  summary, made, _ = decode(model, tmp_path / "given", monkeypatch, **options)
  assert made[1:] == records[1:] and made[0] == {record.id: record for record in static}
  assert summary["sequences"] == len(PROMPTS) * len(GRID) and len(encodings) == 2
  # A second grid of the same batches encodes nothing.
  monkeypatch.setattr(inference.Predictor, "encode", None)
  _, again, _ = decode(model, tmp_path / "again", monkeypatch, **options)
  assert again == made


def test_beginnings_are_taken_over_and_the_records_are_the_same(model, tmp_path, monkeypatch):
  made = compiled.num_made("Program.resume")
  summary, records, begun = decode(model, tmp_path / "reused", monkeypatch)
  # A batch of 4 and one of 2, over the whole grid.
  assert compiled.num_made("Program.resume") - made <= 2
  # Meta: some sequence was decoded on from its middle, and some token was saved by that.
  middles = sum(at for batch in begun for at in batch)
  assert middles > 0 and summary["reused_tokens"] >= middles
  for threshold, made in zip((NEVER_EXIT, *GRID), records, strict=True):
    for plain in grid.with_rule(model, PROMPTS, threshold=threshold):
      reused = made[plain.id]
      assert (reused.tokens, reused.exit_layers) == (plain.tokens, plain.exit_layers)
      np.testing.assert_allclose(reused.confidences, plain.confidences, atol=1e-5)
      np.testing.assert_allclose(
        reused.rejected_confidences, plain.rejected_confidences, atol=1e-5
      )


LAYERS, LENGTH, ALLOWED = 5, 12, (1, 3, 4)


def schedule(threshold, decaying):
  """Constant, or Eq. 5 with `NEVER_EXIT` mapped to itself."""
  steps = np.arange(LENGTH)
  if not decaying or threshold == NEVER_EXIT:
    return np.full(LENGTH, threshold, np.float32)
  values = 0.9 * threshold + 0.1 * np.exp(-4.0 * steps / LENGTH)
  return np.clip(values, 0, 1).astype(np.float32)


def decode_by_hand(prompt, thresholds, prefix=()):
  """(token, exit layer, confidence, refused) per step; `prefix` is taken over, not decoded."""
  steps = list(prefix)
  while len(steps) < LENGTH and not (steps and steps[-1][0] == 1):
    position, refused = len(steps), 0.0
    history = [token * 7 + layer for token, layer, _, _ in steps]
    for layer in range(1, LAYERS + 1):
      generator = np.random.default_rng([prompt, position, layer, *history])
      confidence = np.float32(generator.random())
      token = int(generator.integers(1, 12))
      if layer == LAYERS or (layer in ALLOWED and confidence >= thresholds[position]):
        steps.append((token, layer, 0.0 if layer == LAYERS else confidence, refused))
        break
      if layer in ALLOWED:
        refused = max(refused, confidence)
  return steps


def record_of(prompt, steps):
  tokens, layers, confidences, refused = zip(*steps, strict=True)
  return Record(str(prompt), "text", tokens, layers, confidences, refused)


@pytest.mark.parametrize("decaying", [False, True])
def test_reuse_down_a_grid_equals_plain_decoding(decaying):
  summary = collections.Counter()
  for prompt in range(40):
    previous = None
    for threshold in (NEVER_EXIT, *np.linspace(0.99, 0.0, 12)):
      values = schedule(threshold, decaying)
      plain = decode_by_hand(prompt, values)
      if previous is not None:
        kept = grid.reusable_tokens(record_of(prompt, previous), values)
        assert previous[:kept] == plain[:kept]
        # A refusal of 0 may mean none: at threshold 0 the rule keeps less than it could.
        if kept < len(previous) and threshold > 0.0:
          assert previous[kept] != plain[kept]  # exact: not one token more could be kept
        whole = kept == len(previous)
        assert whole == (previous == plain) or threshold == 0.0
        resumed = previous if whole else decode_by_hand(prompt, values, previous[:kept])
        assert record_of(prompt, resumed) == record_of(prompt, plain)
        summary += collections.Counter(
          tokens=len(plain), reused=min(kept, len(plain)), sequences=1, whole=whole
        )
      previous = plain
  assert 0 < summary["reused"] < summary["tokens"]
  assert 0 < summary["whole"] < summary["sequences"]


def test_reuse_by_hand():
  row = Record("a", "x", [5, 6, 1], [2, 8, 8], [0.8, 0.0, 0.0], [0.1, 0.5, 0.2])
  for thresholds, kept in (
    ([0.6, 0.6, 0.6], 3),
    ([0.6, 0.6, 0.6, 0.0], 3),  # later values belong to no token
    ([0.5, 0.5, 0.5], 1),  # reaching it is exiting
    ([0.0, 0.0, 0.0], 0),
    ([0.6, 0.6, 0.2], 2),
  ):
    assert grid.reusable_tokens(row, thresholds) == kept
  assert grid.reusable_tokens(Record("a", "x", [1]), [1.0]) == 0
  # Comparisons are in float32, as in the decoder.
  confidence = float(np.float32(0.7))
  row = Record("a", "x", rejected_confidences=[confidence])
  assert confidence < 0.7 and grid.reusable_tokens(row, [0.7]) == 0


# ---- While serving


LIVES = [f"{word} {i}" for i in range(6) for word in ("some", "words", "to", "read")]


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
    made.threshold == named and made.texts == model.generate(LIVES[12:], threshold=named).texts
  )
  assert "at least 0.7 over the whole life" in made.guarantee and online.served == 24
  # The losses are those of a calibration of these prompts.
  prompts = [Prompt(text, text) for text in LIVES[:12]]
  _, cached = certified.certify(model, prompts, **ONLINE)
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
  for other in ({"threshold": 0.5}, {"rule": exits.StaticExit()}):
    with pytest.raises(ValueError, match="`online` needs neither"):
      model.generate(LIVES[:1], online=online, **other)
  with pytest.raises(ValueError, match="`ids` of 1 texts, got 2"):
    model.generate(LIVES[:1], online=online, ids=["a", "b"])
  with pytest.raises(ValueError, match="a state of this model under these options"):
    model.with_options(max_decode_length=3).generate(LIVES[:1], online=online)
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
  single, batched = found.single, found.batched
  assert (single.batch_size, single.num_prompts) == (1, 3)
  assert (batched.batch_size, batched.num_prompts) == (2, 6)
  for pair in (single, batched):
    assert pair.full > 0 and pair.speedup == pytest.approx(pair.full / pair.early)
    assert min(pair.speedup, 1) <= pair.end_to_end <= max(pair.speedup, 1)
  assert told == sorted(told) and told[-1] == 1.0


def test_there_are_no_batches_of_too_few_prompts(model):
  assert timing.beside_full_depth(model, TEXTS[:3], 0.6, rounds=1).batched is None


def test_a_threshold_that_is_not_faster_warns_wherever_it_is_served(model, directory, tmp_path):
  made = calibrate.calibrate(np.zeros((200, 2)), [0.9, 0.3], tolerance=0.1, error_rate=0.05)
  made = dataclasses.replace(made, procedure=model.procedure)
  pair = timing.Pair(1, 8, full=1.0, early=1.25, speedup=0.8, end_to_end=0.9)
  timing.note(made, timing.Seconds(pair)).save(tmp_path / "calibration.json")
  with pytest.warns(inference.SlowerThanFullDepth, match=r"x0\.80 one at a time; decode at"):
    inference.load(directory, calibration=tmp_path / "calibration.json")
  faster = dataclasses.replace(pair, early=0.5, speedup=2.0)
  model.under(timing.note(made, timing.Seconds(faster)))  # warns of nothing


FAST = timing.Pair(1, 8, full=4.0, early=2.0, speedup=2.0, end_to_end=1.5)
SLOW = dataclasses.replace(FAST, batch_size=8, early=5.0, speedup=0.8)


def calibrated(losses=0.0):
  table = np.full((100, 2), losses)
  return calibrate.calibrate(table, [0.9, 0.5], tolerance=0.1, error_rate=0.05)


@pytest.mark.parametrize(
  ("measured", "words"),
  [
    (timing.Seconds(FAST), ""),
    (timing.Seconds(FAST, dataclasses.replace(FAST, batch_size=8)), ""),
    (timing.Seconds(FAST, SLOW), "x0.80 in batches of 8"),
    (timing.Seconds(dataclasses.replace(FAST, speedup=1.0), SLOW), "x1.00 one at a time and"),
  ],
)
def test_what_was_measured_is_kept_in_the_file_and_told(measured, words, tmp_path):
  timing.note(calibrated(), measured).save(tmp_path / "calibration.json")
  read = calibrate.Calibration.load(tmp_path / "calibration.json")
  assert timing.noted(read) == measured and read.threshold == 0.5
  told = timing.warning(read)
  assert words in told and bool(told) == bool(words)


def test_nothing_is_said_where_nothing_was_measured_or_certified():
  assert timing.noted(calibrated()) is None and timing.warning(calibrated()) == ""
  assert timing.note(calibrated(), None) == calibrated()
  assert timing.warning(timing.note(calibrated(1.0), timing.Seconds(SLOW))) == ""
  # A note of that name that somebody else wrote.
  for note in (
    {"single": {"speedup": 0.5}, "batched": None},
    "slow",
    {"single": dict.fromkeys(vars(FAST), "x"), "batched": None},
  ):
    provenance = dataclasses.replace(calibrated().provenance, notes={"seconds": note})
    assert timing.noted(dataclasses.replace(calibrated(), provenance=provenance)) is None
