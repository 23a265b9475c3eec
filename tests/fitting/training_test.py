"""Stages in their order, and rows whose targets are the model's own texts."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")

from calm import checkpoints, exits, fitting, inference
from calm.calibrate import Prompt
from calm.fitting import splits, train
from calm.inference import grid, result_cache
from calm.training import sources

pytestmark = pytest.mark.usefixtures("promotion_of_optax")
# No references: nothing here needs them.
ROWS = [Prompt(f"r{i}", f"say {i % 7} {i}", (), f"g{i}") for i in range(80)]


@pytest.fixture(scope="module")
def rows():
  return ROWS


@pytest.fixture
def model(directory):
  return inference.load(directory, max_input_length=16, max_decode_length=4)


def silent(share, text):
  del share, text


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(train, "BATCH", 8)
  monkeypatch.setattr(train, "CHUNK", 8)


def write(model, parts, folder, *, seconds=None, progress=silent):
  """Own texts of the parts; `seconds` is all that the budget has for them."""
  options = fitting.FitOptions(train_all=True, stages="two")
  if seconds is not None:
    options = dataclasses.replace(options, budget=seconds)
  return train.write_own_texts(model, parts, folder, options, progress, lambda text: None)


def full_depth(model, rows):
  return {r.id: r for r in grid.with_rule(model, rows, exits.StaticExit())}


def test_targets_are_the_full_models_texts(model, parts, tmp_path, small_chunks):
  told = []
  progress = lambda share, text: told.append((share, text))
  made = write(model, parts, tmp_path, progress=progress)
  for name in ("train", "validation"):
    rows = getattr(parts, name)
    records = full_depth(model, rows)
    ended = [row for row in rows if records[row.id].tokens[-1] == model.eos_id]
    assert 0 < len(ended) < len(rows), "meta: texts that end and texts that are cut"
    found = getattr(made, name)
    assert [(row.id, row.input) for row in found] == [(row.id, row.input) for row in rows]
    assert [row.targets for row in found] == [(records[row.id].prediction,) for row in found]
    lines = (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row.id for row in found]
  assert (made.calibration, made.last) == (parts.calibration, parts.last)
  shares = [share for share, _ in told]
  assert shares == sorted(shares) and shares[-1] == 1.0


def test_no_end_is_learned_that_a_text_does_not_have(model, parts, tmp_path, small_chunks):
  write(model, parts, tmp_path)
  records = full_depth(model, parts.train)
  ended = sum(record.tokens[-1] == model.eos_id for record in records.values())
  source = sources.supervised(
    str(tmp_path / "train.jsonl"),
    model.vocabulary,
    ((16, 4),),
    batch_size=len(records),
    outputs=str(tmp_path / train.OUTPUTS),
  )
  batch = source.batch(0)
  learned = [
    tuple(row[weights > 0].tolist())
    for row, weights in zip(
      batch["decoder_target_tokens"], batch["decoder_loss_weights"], strict=True
    )
  ]
  assert sorted(learned) == sorted(record.tokens for record in records.values())
  assert 0 < sum(tokens[-1] == model.eos_id for tokens in learned) == ended < len(learned)


def test_what_was_decoded_is_not_decoded_again(
  model, parts, tmp_path, small_chunks, monkeypatch
):
  made = write(model, parts, tmp_path)
  again, decoded = grid.with_rule, []

  def counted(predictor, rows, *given, **named):
    decoded.append(len(rows))
    return again(predictor, rows, *given, **named)

  monkeypatch.setattr(grid, "with_rule", counted)
  assert write(model, parts, tmp_path) == made and not decoded
  (tmp_path / "train-00000008.json").unlink()
  assert write(model, parts, tmp_path) == made and decoded == [8]


def test_rows_that_come_too_late_are_left_out_and_one_chunk_always_is_in_time(
  model, parts, tmp_path, small_chunks
):
  made = write(model, parts, tmp_path, seconds=1e-9)
  first = write(model, parts, tmp_path / "whole")
  assert len(made.validation) == len(first.validation)
  assert len(made.train) == 8 < len(first.train)
  assert made.train == first.train[: len(made.train)]


@pytest.mark.parametrize(
  ("name", "order"),
  [
    ("all", ["stage one", "Decode", "stage own", "stage two"]),
    ("both", ["stage one", "Decode", "stage two"]),
    ("own", ["Decode", "stage own", "stage two"]),
    ("two", ["Decode", "stage two"]),
    ("one", ["stage one"]),
    ("none", []),
  ],
)
def test_the_order_of_the_stages_and_their_shares_of_the_budget(name, order):
  options = fitting.FitOptions(train_all=True, stages=name, budget=100.0)
  titles = train.titles(options)
  assert [part in title for part, title in zip(order, titles, strict=True)] == [True] * len(
    order
  )
  assert options.needs_targets == bool({"one", "own"} & set(options.trains))
  accepted = dataclasses.replace(options, accept_quality=True)
  assert accepted.needs_targets == ("one" in options.trains)
  names = [*options.trains, *([train.TEXTS] if options.learns_own_texts else [])]
  shares = [train.share_of(each, options) for each in names]
  assert sum(shares) == pytest.approx(1.0 if names else 0.0)


def test_layers_learn_the_models_own_texts_without_references(
  directory, model, parts, tmp_path, small_chunks, monkeypatch
):
  real = train.recipe
  few = lambda *given: dataclasses.replace(real(*given), num_steps=3, batch_size=4)
  monkeypatch.setattr(train, "recipe", few)
  options = fitting.FitOptions(train_all=True, stages="own", batch_size=8)
  splits.write(tmp_path / "mine" / "splits", parts)
  work = tmp_path / "mine" / "fit"
  work.mkdir()
  cache = result_cache.ResultCache(work / "results")
  steps, said = [], []
  begun = lambda title: steps.append(title) or silent
  made, done = train.train_stages(
    model, directory, parts, tmp_path / "mine", options, {}, cache, begun, said.append
  )
  assert steps == train.titles(options) and [each.name for each in done] == ["own", "two"]
  texts = {row.id: row.prediction for row in full_depth(model, parts.train).values()}
  for line in (work / "own_texts" / "train.jsonl").read_text("utf-8").splitlines():
    assert json.loads(line)["target"] == [texts[json.loads(line)["id"]]]
  before, after = checkpoints.load(directory).params, made.params
  kernel = lambda tree: np.asarray(tree["decoder"]["layers_0"]["mlp"]["wo"]["kernel"])
  assert np.any(kernel(before) != kernel(after))
  assert np.any(after["decoder"]["exit_probes"]["kernel"])
  assert any(line.startswith("Own texts: of ") for line in said)
