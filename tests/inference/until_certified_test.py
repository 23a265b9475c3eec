"""A run that stops when it is decided: encoded once, decoded where it must be, by unit."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from calm import inference
from calm.calibrate import Prompt, generations, sequential
from calm.calibrate import losses as sequence_losses
from calm.calibrate.generations import cache, order
from calm.exits import schedules
from calm.inference import grid
from tests.inference import predictor_test

THRESHOLDS = [0.9, 0.6, 0.3]
# One padded length and whole batches, so that a run compiles once.
TEXTS = [f"{word} {i}" for i in range(6) for word in ("some", "words", "to", "read")]
PROMPTS = [Prompt(f"p{i}", text, (), f"source {i // 4}") for i, text in enumerate(TEXTS)]
LOSS = {"kind": "textual", "metric": "rouge_l"}
# Lenient: losses of a toy are large, and all three thresholds should be decided on.
RATES = {"tolerance": 0.8, "error_rate": 0.3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
  return inference.load(directory, **predictor_test.OPTIONS)


@pytest.fixture
def calls(monkeypatch):
  """Rows encoded, and rows decoded at each threshold."""
  counts = collections.Counter()
  encode, decode = inference.Predictor.encode, inference.Predictor.decode

  def counted_encode(self, batch):
    counts["encoded"] += len(batch.rows)
    return encode(self, batch)

  def counted_decode(self, encoded, active, threshold, *others):
    counts[threshold] += int(np.sum(active))
    return decode(self, encoded, active, threshold, *others)

  monkeypatch.setattr(inference.Predictor, "encode", counted_encode)
  monkeypatch.setattr(inference.Predictor, "decode", counted_decode)
  return counts


def run(model, folder, *, by_group=False, rates=RATES, **options):
  """(calibration, cached generations) of a run into `folder`."""
  prompts = grid.sequential_order(model, PROMPTS, ungrouped=not by_group)
  writer = cache.open_writer(
    folder,
    prompts=prompts,
    thresholds=THRESHOLDS,
    procedure=model.procedure,
    sequential=True,
    by_group=by_group,
  )
  units = order.unit_names(
    [p.id for p in prompts], order.known_groups(prompts) if by_group else None
  )
  test = sequential.SequentialCalibration(
    THRESHOLDS, len(units), clusters=by_group, support=LOSS_SUPPORT, **rates
  )
  made = grid.generate_until_certified(model, prompts, writer, test, **LOSS, **options)
  writer.finish()
  return made, generations.load(folder)


LOSS_SUPPORT = sequence_losses.kind_support(**LOSS)


def test_every_prompt_is_encoded_once_for_all_thresholds(model, tmp_path, calls, monkeypatch):
  found, cached = run(model, tmp_path / "kept")
  used = [len(records) for records in cached.records]
  assert min(used) > 0 and len(cached.full) == max(used)  # every threshold was looked at
  assert calls["encoded"] == max(used) == calls[schedules.NEVER_EXIT]
  again = calls["encoded"]
  monkeypatch.setattr(grid, "KEPT_BYTES", 0)
  anew, same = run(model, tmp_path / "anew")
  assert calls["encoded"] - again > max(used)  # without memory for them: more than once
  assert anew == found and same.records == cached.records


def test_records_are_those_of_plain_decoding_and_some_were_taken_over(model, tmp_path, calls):
  _, cached = run(model, tmp_path)
  asked = sum(len(records) for records in cached.records)
  decoded = sum(calls[threshold] for threshold in THRESHOLDS)
  assert 0 < decoded < asked
  texts = [prompt.input for prompt in cached.prompts]
  for threshold, records in zip(THRESHOLDS, cached.records, strict=True):
    plain = model.generate(texts[: len(records)], threshold=threshold)
    for record, output in zip(records, plain, strict=True):
      assert (record.prediction, record.tokens) == (output.text, output.tokens)
      assert record.exit_layers == output.exit_layers
      np.testing.assert_allclose(record.confidences, output.confidences, atol=1e-5)


def test_a_run_that_was_killed_goes_on_without_decoding_again(model, tmp_path, calls):
  found, cached = run(model, tmp_path / "whole")
  (tmp_path / "part").mkdir()
  for file in (tmp_path / "whole").iterdir():
    (tmp_path / "part" / file.name).write_bytes(file.read_bytes())
  # A run that did not end has no checksums yet.
  manifest = tmp_path / "part" / generations.MANIFEST
  manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "checksums": {}}))
  path = tmp_path / "part" / generations.threshold_file(0.9)
  path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-2]) + b'{"id": "p')
  calls.clear()
  again, same = run(model, tmp_path / "part")
  assert again == found and same.records == cached.records and same.full == cached.full
  assert calls[schedules.NEVER_EXIT] == 0 and calls[0.9] <= 2 and calls[0.3] == 0


def test_clusters_are_decoded_whole_and_tested_on_their_means(model, tmp_path):
  found, cached = run(model, tmp_path, by_group=True)
  assert found.clusters and found.num_examples == len(TEXTS) // 4 and cached.by_group
  assert len({prompt.group for prompt in cached.prompts[:4]}) == 1
  assert all(len(records) % 4 == 0 for records in cached.records)
  assert sequential.replay(cached, **LOSS, **RATES) == found
  # The first threshold's bets are those of `calibrate` on the same clusters and order.
  count = found.rows[0].num_examples
  losses = sequence_losses.prefix_losses(cached, **LOSS)[0]
  means = order.unit_means(
    losses,
    order.consecutive_units(
      len(losses), [prompt.group for prompt in cached.prompts[: len(losses)]]
    ),
  )
  test = sequential.SequentialCalibration([0.9], found.num_examples, clusters=True, **RATES)
  test.add(means)
  assert test.calibration().rows[0].num_examples == count


def test_prompts_of_one_text_stand_together_as_those_of_one_group_do(model):
  twins = [
    dataclasses.replace(prompt, group=None, input=f"Text {i % 12}" + " " * (i // 12))
    for i, prompt in enumerate(PROMPTS)
  ]
  inputs = [prompt.input.split()[1] for prompt in grid.sequential_order(model, twins)]
  assert inputs[::2] == inputs[1::2] and len(set(inputs)) == 12
  alone = [prompt.input for prompt in grid.sequential_order(model, twins, ungrouped=True)]
  assert len(set(alone)) == 24
