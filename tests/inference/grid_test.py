"""A grid decoded from where each sequence changes: the same records, fewer steps."""

import numpy as np
import pytest

from calm import exits, inference
from calm.calibrate import Prompt, Provenance
from calm.calibrate.generations import cache
from calm.decode import compiled
from calm.exits import schedules
from calm.inference import grid
from tests.inference import predictor_test

THRESHOLDS = [0.9, 0.6, 0.3]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(predictor_test.TEXTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  return inference.load(directory, **{**predictor_test.OPTIONS, "max_input_length": 32})


def decode(model, directory, monkeypatch, **options):
  """(what was reused, records by threshold, steps that the loops began at)."""
  begun = []
  resume = inference.Predictor.resume

  def counted(self, encoded, state, active, threshold, resume_at):
    begun.append(resume_at[active].tolist())
    return resume(self, encoded, state, active, threshold, resume_at)

  monkeypatch.setattr(inference.Predictor, "resume", counted)
  provenance = Provenance(grid=tuple(THRESHOLDS), num_examples=len(PROMPTS))
  writer = cache.open_writer(
    directory,
    prompts=PROMPTS,
    thresholds=THRESHOLDS,
    procedure=model.procedure,
    provenance=provenance,
  )
  summary = grid.generate(model, PROMPTS, THRESHOLDS, writer, **options)
  levels = [schedules.NEVER_EXIT, *THRESHOLDS]
  return summary, [writer.completed_records(x) for x in levels], begun


@pytest.mark.filterwarnings("ignore:.*prompts have more than")
def test_full_depth_that_is_known_is_not_decoded_nor_taken_over(model, tmp_path, monkeypatch):
  _, records, _ = decode(model, tmp_path / "whole", monkeypatch)
  static = grid.with_rule(model, PROMPTS, exits.StaticExit())
  encodings = {}
  options = {"full": static, "encodings": encodings}
  summary, made, _ = decode(model, tmp_path / "given", monkeypatch, **options)
  assert made[1:] == records[1:] and made[0] == {record.id: record for record in static}
  assert summary["sequences"] == len(PROMPTS) * len(THRESHOLDS) and len(encodings) == 2
  # A second grid of the same batches encodes nothing.
  monkeypatch.setattr(inference.Predictor, "encode", None)
  _, again, _ = decode(model, tmp_path / "again", monkeypatch, **options)
  assert again == made


@pytest.mark.filterwarnings("ignore:.*prompts have more than")
def test_beginnings_are_taken_over_and_the_records_are_the_same(model, tmp_path, monkeypatch):
  made = compiled.num_made("Program.resume")
  summary, records, begun = decode(model, tmp_path / "reused", monkeypatch)
  # A batch of 4 and one of 2, over the whole grid.
  assert compiled.num_made("Program.resume") - made <= 2
  # Meta: some sequence was decoded on from its middle, and some token was saved by that.
  middles = sum(at for batch in begun for at in batch)
  assert middles > 0 and summary["reused_tokens"] >= middles
  for threshold, made in zip((schedules.NEVER_EXIT, *THRESHOLDS), records, strict=True):
    for plain in grid.with_rule(model, PROMPTS, threshold=threshold):
      reused = made[plain.id]
      assert (reused.tokens, reused.exit_layers) == (plain.tokens, plain.exit_layers)
      np.testing.assert_allclose(reused.confidences, plain.confidences, atol=1e-5)
      np.testing.assert_allclose(
        reused.rejected_confidences, plain.rejected_confidences, atol=1e-5
      )
