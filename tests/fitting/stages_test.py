"""Stages train, resume and scale to a budget; recipes by size."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")

from calm import checkpoints, fitting, inference, training
from calm.calibrate import Prompt
from calm.fitting import splits, train
from calm.t5 import network
from calm.training import objectives

pytestmark = pytest.mark.usefixtures("promotion_of_optax")
ROWS = [Prompt(f"r{i}", f"say {i % 7} {i}", (f"{i % 7}",), f"g{i}") for i in range(80)]


@pytest.fixture(scope="module")
def rows():
  return ROWS


@pytest.fixture
def stage(directory, parts, tmp_path, monkeypatch):
  """Few steps of few rows; the recipe's numbers are tested by themselves."""
  real = train.recipe
  few = lambda *given: dataclasses.replace(real(*given), num_steps=4, batch_size=4)
  monkeypatch.setattr(train, "recipe", few)
  splits.write(tmp_path / "splits", parts)
  model = inference.load(directory)
  limits, cut = splits.length_limits(model, ROWS, "p: ")
  assert not cut
  model = model.with_options(**limits)
  return lambda name, **options: train.Stage(
    name,
    directory,
    model,
    parts,
    tmp_path / "splits",
    tmp_path / f"stage_{name}",
    fitting.FitOptions(train_all=True, stages=name, **options),
  )


def silent(*given):
  del given


def test_both_stages_train_what_they_should(stage, directory):
  reports, said = [], []
  one = stage("one")
  progress = lambda share, text: reports.append((share, text))
  done = one.train(one.plan(None, said.append), progress, said.append)
  assert done.steps == 4 and reports[-1][0] == 1.0 and "step 4 of 4" in reports[-1][1]
  assert [step for step, _ in done.losses] == [1, 2, 3, 4]
  trained = inference.load(one.exported)
  assert trained.options.task_prefix == "p: " and trained.options.shortlist
  two = dataclasses.replace(stage("two"), initial=one.exported, model=trained)
  two.train(two.plan(None, said.append), silent, said.append)
  first, second = (checkpoints.load(s.exported).params for s in (one, two))
  new = lambda path: "exit_probes" in jax.tree_util.keystr(path)
  differs = lambda path, leaf: new(path) or bool(np.any(leaf != _at(first, path)))
  changed = {
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(second)
    if differs(path, leaf)
  }
  assert all("exit_classifier" in path or "exit_probes" in path for path in changed)
  for part in ("exit_classifier", "exit_probes"):
    assert np.any(second["decoder"][part]["kernel"]) and any(part in path for path in changed)
  before = checkpoints.load(directory).params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]
  assert np.any(before != first["decoder"]["layers_0"]["mlp"]["wo"]["kernel"])
  # A finished stage trains no step more.
  again = one.train(one.plan(None, said.append), silent, said.append)
  assert again.losses == done.losses


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree


def test_a_budget_sets_the_steps_and_says_what_the_recipe_would_take(stage):
  said = []
  plan = stage("two", budget=3600.0).plan(None, said.append)
  assert plan.num_steps == 40  # at most ten times the recipe's
  assert "the recipe has 4:" in said[0]
  assert stage("two", budget=1e-3).plan(None, said.append).num_steps == 4


def test_steps_validations_and_compiling_all_fit_the_budget(stage, monkeypatch):
  long, short = (448, 32), (128, 32)
  monkeypatch.setattr(train, "recipe", lambda *given: RECIPE)
  monkeypatch.setattr(train.Stage, "_buckets", lambda self: (short, long))
  timed = train.Timed(rows=4, seconds=2.0, compiling=10.0, spent=16.0)
  one = stage("one")
  sized = dataclasses.replace(one.model, config=SMALL)
  rows = dataclasses.replace(one.splits, validation=ROWS[:64] * 2)
  one = dataclasses.replace(one, model=sized, splits=rows)
  each, overhead, validation = one._seconds(timed)
  ratio = train.row_bytes(SMALL, short) / train.row_bytes(SMALL, long)
  assert each == pytest.approx(32.0 * (0.35 * ratio + 0.25) / 0.6)
  assert overhead == 16.0 + 30.0  # two lengths, and the validation
  assert validation == pytest.approx(0.4 * 2.0 * 128 / 4)  # four rows took two seconds

  def plan(budget):
    options = dataclasses.replace(one.options, budget=budget)
    made = dataclasses.replace(one, options=options).plan(timed, silent)
    return made.num_steps, -(-made.num_steps // made.eval_every)

  steps, validations = plan(1800.0)
  assert validations == 8
  spent = overhead + validations * validation
  assert spent + steps * each <= 1800.0 < spent + (steps + 1) * each
  assert plan(300.0)[1] == 1 and plan(1.0) == (20, 1)
  least = one.least_budget(timed)
  assert least == pytest.approx(overhead + validation + 20 * each)
  assert plan(least)[0] == 20 and plan(1.5 * least)[0] > 20
  assert plan(1e6)[0] == 10 * RECIPE.num_steps


def test_recipes_by_size_are_the_papers_and_the_packed_models():
  small = checkpoints.load(inference.PACKED).config
  base = network.T5Config(
    vocab_size=32128,
    emb_dim=768,
    num_heads=12,
    mlp_dim=2048,
    num_encoder_layers=12,
    num_decoder_layers=12,
    mlp_activations=("gelu", "linear"),
  )
  leaves = jax.tree.leaves(checkpoints.load(inference.PACKED).params)
  assert train.num_parameters(small) == pytest.approx(sum(x.size for x in leaves), rel=0.01)
  assert 2.4e8 < train.num_parameters(base) < 2.6e8
  tuned = train.recipe("one", base, 10_000)
  assert tuned.batch_size == 64 and train.recipe("one", base, 150).batch_size == 32
  assert (tuned.peak, tuned.final_fraction, tuned.dropout_rate) == (1e-3, 1.0, 0.1)
  assert tuned.denoising == 0 and tuned.num_steps == 3 * 10_000 // 64
  box = train.recipe("one", small, 10_000)
  assert box.peak == 1e-2 and box.dropout_rate == 0.05 and box.denoising == 1


SMALL = network.T5Config(
  vocab_size=32128,
  emb_dim=512,
  num_heads=6,
  head_dim=64,
  mlp_dim=1024,
  num_encoder_layers=8,
  num_decoder_layers=8,
  mlp_activations=("gelu", "linear"),
)
RECIPE = dataclasses.replace(train.recipe("one", SMALL, 1000), batch_size=64)


@pytest.mark.parametrize(("length", "parts"), [(64, 2), (448, 16), (1024, 32)])
def test_a_step_on_long_rows_is_made_in_parts_that_fit_the_memory(length, parts):
  assert train.microbatches(SMALL, (length, 32), 64) == parts
  rows = 64 // parts
  held = rows * train.row_bytes(SMALL, (length, 32))
  assert rows == 1 or held <= 2**31 < 2 * held
  assert train.microbatches(SMALL, (length, 32), 2) <= 2


def test_the_memory_of_a_row_is_what_the_compiler_says():
  config = network.T5Config(
    vocab_size=600,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=64,
    num_encoder_layers=2,
    num_decoder_layers=2,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.1,
  )
  bucket = (128, 32)
  wanted = train.row_bytes(config, bucket)
  least = _step_bytes(config, bucket, 8)
  added = (_step_bytes(config, bucket, 24) - least) / 16
  assert 0.7 * added < wanted < 1.5 * added
  # In parts, a batch needs the memory of one.
  assert _step_bytes(config, bucket, 24, parts=3) < least + 4 * wanted


def _step_bytes(config, bucket, rows, parts=1):
  """Temporary memory of a compiled step of stage one."""
  objective = objectives.LayerWeighted(sampled_layers=2)
  settings = training.TrainConfig(2, num_microbatches=parts)
  params = training.init_params(config, 0)
  step = training.make_train_step(network.Transformer(config), settings, objective, params)
  read, written = (np.ones((rows, length), np.int32) for length in bucket)
  batch = {
    "encoder_input_tokens": read,
    "decoder_input_tokens": written,
    "decoder_target_tokens": written,
    "decoder_loss_weights": written.astype(np.float32),
  }
  state = training.init_state(params, settings, objective)
  # Memory as users' programs have it, whose code is generated so.
  made = step.lower(state, batch).compile({"xla_cpu_use_fusion_emitters": True})
  return made.memory_analysis().temp_size_in_bytes


def test_buckets_ascend_to_the_limits():
  made = train.buckets(range(1, 101), range(1, 21), (96, 24))
  assert made == ((40, 24), (80, 24), (96, 24))
  assert train.buckets([5] * 9, [3] * 9, (8, 8)) == ((8, 8),)
