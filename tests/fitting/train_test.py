"""Stages of `train_all`: a budget, and rows of the model's own texts."""

import pytest

pytest.importorskip(
  "orbax.checkpoint", reason="Orbax (the `train` extra) is not installed"
)

from calm import exits, fitting, inference
from calm.calibrate import Prompt
from calm.fitting import request, train
from calm.inference import grid
from calm.training import sources

pytestmark = pytest.mark.usefixtures("promotion")
ROWS = [
  Prompt(f"r{i}", f"say {i % 7} {i}", (f"{i % 7}",), f"g{i}") for i in range(80)
]


@pytest.fixture
def parts():
  return request.split(ROWS, fitting.FitOptions(tolerance=0.5), trains=True)


@pytest.fixture
def source(directory):
  return inference.load(
    directory, max_input_length=16, max_decode_length=4, batch_size=8
  )


def fit_of(source, directory, parts, folder):
  options = fitting.FitOptions(train_all=True, batch_size=8)
  given = source, source, directory, parts, folder, options
  return request.Fit(
    *given, lambda text: None, lambda title: lambda share, text: None
  )


def full_depth(model, rows):
  return {r.id: r for r in grid.with_rule(model, rows, exits.StaticExit())}


def test_a_budget_stops_a_stage_which_is_exported_then(
  directory, source, parts, tmp_path
):
  request.write(tmp_path / "splits", parts)
  fit = fit_of(source, directory, parts, tmp_path)
  given = "two", source, directory, parts, tmp_path / "splits", 1e-6
  made = train.train_stage(fit, *given)
  assert [step for step, _ in made.losses] == [1]
  assert inference.load(fit.work / "stage_two" / "model").options.shortlist


def test_no_end_is_learned_that_a_text_does_not_have(
  directory, source, parts, tmp_path
):
  fit = fit_of(source, directory, parts, tmp_path / "fit")
  made = train.write_own_texts(fit, source, tmp_path)
  assert (made.calibration, made.last) == (parts.calibration, parts.last)
  records = full_depth(source, parts.train)
  assert [row.targets[0] for row in made.train] == [
    r.prediction for r in records.values()
  ]
  ended = sum(record.tokens[-1] == source.eos_id for record in records.values())
  batch = sources.supervised(
    str(tmp_path / "train.jsonl"),
    source.vocabulary,
    ((16, 4),),
    batch_size=len(records),
    outputs=str(tmp_path / train.OUTPUTS),
  ).batch(0)
  columns = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
  learned = [
    tuple(row[on > 0].tolist()) for row, on in zip(*columns, strict=True)
  ]
  assert sorted(learned) == sorted(record.tokens for record in records.values())
  assert (
    0
    < sum(tokens[-1] == source.eos_id for tokens in learned)
    == ended
    < len(learned)
  )
