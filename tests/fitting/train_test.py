"""Stages of `train_all`: recipes, what each trains, and rows of the model's own texts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")

from calm import checkpoints, exits, fitting, inference
from calm.calibrate import Prompt
from calm.fitting import request, train
from calm.inference import grid, result_cache
from calm.training import sources

pytestmark = pytest.mark.usefixtures("promotion")
ROWS = [Prompt(f"r{i}", f"say {i % 7} {i}", (f"{i % 7}",), f"g{i}") for i in range(80)]


@pytest.fixture
def parts():
  return request.split(ROWS, trains=True, tolerance=0.5, error_rate=0.05)


@pytest.fixture
def source(directory):
  return inference.load(directory, max_input_length=16, max_decode_length=4, batch_size=8)


def silent(share, text):
  del share, text


def full_depth(model, rows):
  return {r.id: r for r in grid.with_rule(model, rows, exits.StaticExit())}


def test_stages_train_what_they_should_and_are_trained_once(
  directory, source, parts, tmp_path, monkeypatch
):
  real = train.recipe
  few = lambda *given: train.Recipe(
    4, 0.0, dataclasses.replace(real(*given).config, num_steps=4)
  )
  monkeypatch.setattr(train, "recipe", few)
  request.write(tmp_path / "splits", parts)
  cache, told = result_cache.ResultCache(tmp_path / "results"), []
  begin = lambda title: lambda share, text: told.append((title, share, text))
  options = fitting.FitOptions(train_all=True, batch_size=8)
  run = lambda: train.train_stages(source, directory, parts, tmp_path, options, cache, begin)
  made, reports = run()
  assert [report.name for report in reports] == ["one", "own", "two"]
  assert [[step for step, _ in report.losses] for report in reports] == [[1, 2, 3, 4]] * 3
  assert told[-1][:2] == ("Train stage two", 1.0) and "step 4 of 4, loss" in told[-1][2]
  given, one, own, two = (
    checkpoints.load(folder).params["decoder"]
    for folder in (
      directory,
      *(tmp_path / "fit" / f"stage_{name}" / "model" for name in ("one", "own", "two")),
    )
  )
  kernel = lambda tree: np.asarray(tree["layers_0"]["mlp"]["wo"]["kernel"])
  assert np.any(kernel(given) != kernel(one)) and np.any(kernel(one) != kernel(own))
  for part in ("exit_classifier", "exit_probes"):
    assert np.any(two[part]["kernel"])
  two.pop("exit_probes")
  two["exit_classifier"] = own["exit_classifier"]
  jax.tree.map(np.testing.assert_array_equal, two, own)
  assert made.options.shortlist and made.options.max_decode_length == 4
  # Stage two reads the texts that the model wrote after stage one, not references.
  lines = (tmp_path / "fit" / "own_texts" / "train.jsonl").read_text("utf-8").splitlines()
  after = inference.load(tmp_path / "fit" / "stage_one" / "model", batch_size=8)
  texts = {row.id: row.prediction for row in full_depth(after, parts.train).values()}
  assert {(row := json.loads(line))["id"]: row["target"] for line in lines} == {
    name: [text] for name, text in texts.items()
  }
  told.clear()
  assert run()[1] == reports and not told


def test_a_budget_stops_a_stage_which_is_exported_then(directory, source, parts, tmp_path):
  request.write(tmp_path / "splits", parts)
  stage = "two", source, directory, parts, tmp_path / "splits", tmp_path / "run"
  made = train.train_stage(*stage, seed=0, seconds=1e-6, progress=silent)
  assert [step for step, _ in made.losses] == [1]
  assert inference.load(tmp_path / "run" / "model").options.shortlist


def test_recipes_by_size_are_the_papers_and_the_packed_models():
  tuned = train.recipe("one", 250_000_000, 10_000)
  assert tuned.batch_size == 64 and train.recipe("one", 250_000_000, 150).batch_size == 32
  schedule = tuned.config.schedule
  assert (schedule.peak, schedule.final_fraction, tuned.dropout_rate) == (1e-3, 1.0, 0.1)
  assert tuned.config.num_steps == 3 * 10_000 // 64
  box = train.recipe("one", 5_000_000, 10_000)
  assert box.config.schedule.peak == 1e-2 and box.dropout_rate == 0.05


def test_no_end_is_learned_that_a_text_does_not_have(source, parts, tmp_path):
  cache = result_cache.ResultCache(tmp_path / "results")
  made = train.write_own_texts(source, parts, tmp_path, cache, silent)
  assert (made.calibration, made.last) == (parts.calibration, parts.last)
  records = full_depth(source, parts.train)
  assert [row.targets[0] for row in made.train] == [r.prediction for r in records.values()]
  ended = sum(record.tokens[-1] == source.eos_id for record in records.values())
  batch = sources.supervised(
    str(tmp_path / "train.jsonl"),
    source.vocabulary,
    ((16, 4),),
    batch_size=len(records),
    outputs=str(tmp_path / train.OUTPUTS),
  ).batch(0)
  columns = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
  learned = [tuple(row[on > 0].tolist()) for row, on in zip(*columns, strict=True)]
  assert sorted(learned) == sorted(record.tokens for record in records.values())
  assert 0 < sum(tokens[-1] == source.eos_id for tokens in learned) == ended < len(learned)
