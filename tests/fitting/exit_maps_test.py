"""Exits beside frozen weights: what is fitted is right, and nothing of the
model changes.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip(
  "optax", reason="optax (the `train` extra) is not installed"
)
pytest.importorskip(
  "jinja2", reason="jinja2 (the `report` extra) is not installed"
)

from calm import checkpoints, exits, fitting, inference
from calm.checkpoints import files
from calm.fitting import exit_maps
from calm.inference import grid
from calm.t5 import parameters
from tests.fitting import conftest

pytestmark = pytest.mark.usefixtures("promotion", "few_rounds")
OPTIONS = conftest.OPTIONS


def sums_of(x, last, inputs, squares=None):
  """Normal equations of one layer's states."""
  rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  squares = np.square(inputs).sum(axis=(0, 2)) if squares is None else squares
  moved = np.einsum("te,tkf->ekf", rows, inputs)
  return exit_maps._Sums(rows.T @ rows, rows.T @ last, moved, squares)


def test_ridge_finds_a_linear_map_and_needs_its_penalty_for_few_tokens():
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(6, 6))
  bias = rng.normal(size=6)
  for tokens, close in ((500, 1e-3), (4, None)):
    x = rng.normal(size=(tokens, 6))
    last = x @ truth + bias
    held = np.arange(tokens // 2, tokens)
    scalars = np.zeros((1, tokens, 2))
    sample = exit_maps._Sample(
      x[None], last, scalars, np.arange(tokens // 2), held
    )
    sums = [
      sums_of(
        x[: tokens // 2], last[: tokens // 2], np.zeros((tokens // 2, 1, 6))
      )
    ]
    penalty, ((kernel, offset),) = exit_maps._ridge(sums, sample)
    assert penalty in exit_maps._PENALTIES and np.isfinite(kernel).all()
    if close is not None:
      np.testing.assert_allclose(kernel + np.eye(6), truth, atol=close)
      np.testing.assert_allclose(offset, bias, atol=close)


@pytest.mark.parametrize("rank", [2, 5])
def test_propagation_of_rank_r_is_exact_where_the_truth_has_rank_r(rank):
  """Skipped layers k = j + 2 ... are predicted; the next layer's input is the
  state itself.
  """
  rng = np.random.default_rng(1)
  # layers j + 1 ... j + 4
  emb_dim = 8
  skipped = 4
  x = rng.normal(size=(400, emb_dim))
  down = rng.normal(size=(emb_dim, rank))
  up = rng.normal(size=(skipped - 1, rank, emb_dim))
  inputs = np.einsum("te,er,krf->tkf", x, down, up)
  kernel, bias, made = exit_maps._low_rank(
    sums_of(x, x, inputs), 1e-12, rank, skipped
  )
  assert kernel.shape == (emb_dim, rank) and made.shape == (
    skipped,
    rank,
    emb_dim,
  )
  assert not made[0].any()
  predicted = np.einsum("tr,krf->tkf", x @ kernel + bias, made[1:])
  np.testing.assert_allclose(predicted, inputs, atol=1e-3)
  worse = exit_maps._low_rank(sums_of(x, x, inputs), 1e-12, rank - 1, skipped)
  short = np.einsum("tr,krf->tkf", x @ worse[0] + worse[1], worse[2][1:])
  assert np.abs(short - inputs).max() > 0.1


def test_a_vocabulary_that_is_drawn_from_estimates_the_whole_loss():
  rng = np.random.default_rng(2)
  head = rng.normal(size=(300, 8)).astype(np.float32)
  exits_ = rng.normal(size=(2, 64, 8))
  last = rng.normal(size=(64, 8))
  maps = 0.1 * rng.normal(size=(2, 8, 8)), np.zeros((2, 8))

  def loss(columns, drawn):
    return float(
      exit_maps.cross_entropy(maps, exits_, last, drawn, head, columns=columns)
    )

  whole = loss(np.arange(300), np.zeros(0, int))
  columns = np.arange(100)
  others = np.arange(100, 300)
  drawn = [
    loss(columns, rng.choice(others, 100, replace=False)) for _ in range(30)
  ]
  assert abs(np.mean(drawn) - whole) < 0.1 * whole
  assert abs(loss(columns, others) - whole) < 1e-4


@pytest.fixture(scope="module")
def fitted(directory, rows, promotion, few_rounds, tmp_path_factory):
  """(input folder, output folder, the served model, what was said), stopped and
  resumed.
  """
  output = tmp_path_factory.mktemp("fit") / "mine"
  said = conftest.Said()

  def fit():
    return fitting.fit(
      directory, rows, output=output, console=said.console, **OPTIONS
    )

  def stop(*arguments, **options):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(exit_maps, "_STEPS", 100)
    with patch.context() as stopped, pytest.raises(KeyboardInterrupt):
      stopped.setattr(exit_maps, "fit", stop)
      fit()
    assert (
      not (output / checkpoints.EXITS).exists()
      and (output / "fit" / "results").is_dir()
    )
    return directory, output, fit(), said.lines


def test_the_base_is_copied_byte_for_byte_and_its_full_texts_stay(fitted, rows):
  source, output, served, said = fitted
  for name in ("params.safetensors", "config.json", "vocabulary.json"):
    assert (output / name).read_bytes() == (source / name).read_bytes()
  limits = ("task_prefix", "max_input_length", "max_decode_length")
  same = {name: getattr(served.options, name) for name in limits}
  before = inference.load(source, **same)
  assert parameters.base_digest(served.params) == parameters.base_digest(
    before.params
  )
  assert any(
    parameters.base_digest(before.params)[:12] in line for line in said
  )

  def full(model):
    return [
      record.tokens
      for record in grid.with_rule(model, rows[:20], exits.StaticExit())
    ]

  assert full(before) == full(inference.load(output))
  assert (
    served.config.exit_translators == (1, 2) == served.config.exit_propagation
  )
  assert served.config.exit_probes and served.config.exit_classifier
  learned = json.loads((output / "fit" / "result.json").read_text("utf-8"))[
    "learned"
  ]
  assert learned["layers"] == [1, 2] and learned["num_tokens"] > 0
  assert np.mean(learned["agreement_after"]) > np.mean(
    learned["agreement_before"]
  )


def test_exits_open_beside_their_base_and_beside_no_other(fitted, tmp_path):
  source, output, served, _ = fitted
  beside = inference.load(source, exits=output)
  assert beside.parameters_digest == served.parameters_digest
  edited = tmp_path / "edited"
  shutil.copytree(output, edited)
  for name in ("calibration.json", "full_depth.json"):
    (edited / name).unlink(missing_ok=True)
  leaves, _ = files.read_safetensors(edited / "params.safetensors")
  leaves["decoder/decoder_norm/scale"] = (
    leaves["decoder/decoder_norm/scale"] * 1.001
  )
  files.safetensors_writer(leaves)(edited / "params.safetensors")
  with pytest.raises(
    ValueError, match="another model, or one that was edited since"
  ):
    inference.load(edited)
  with pytest.raises(FileNotFoundError, match="`exits` to be a file of exits"):
    inference.load(source, exits=tmp_path / "nowhere")
  (edited / checkpoints.EXITS).write_bytes(
    (output / checkpoints.EXITS).read_bytes()[:-8]
  )
  with pytest.raises(ValueError, match="whole safetensors file"):
    inference.load(edited)
  checkpoints.save_exits(
    edited / checkpoints.EXITS, {"encoder/x": np.zeros(1)}, ""
  )
  with pytest.raises(ValueError, match="to be exits of the format"):
    inference.load(edited)


def test_states_that_are_not_finite_are_refused(directory):
  model = inference.load(directory, batch_size=4, max_decode_length=6)
  flat = parameters.flatten(model.params)
  flat["decoder/layers_0/mlp/wo/kernel"] = (
    flat["decoder/layers_0/mlp/wo/kernel"] * np.inf
  )
  broken = dataclasses.replace(model, params=parameters.unflatten(flat))
  with pytest.raises(ValueError, match="finite states"):
    exit_maps.fit(
      broken, ["a b"], [[3, 1]], (1, 2), rank=2, progress=grid.silent
    )
