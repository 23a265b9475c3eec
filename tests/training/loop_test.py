"""The trainer: exact after SIGKILL, stops early, and says what is wrong."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
  "orbax.checkpoint", reason="Orbax (the `train` extra) is not installed"
)

from calm import training
from calm.data import training_batches
from calm.t5 import network
from calm.training import loop, objectives, run, updates

pytestmark = pytest.mark.usefixtures("collect_orphans")
REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def lenient_promotion():
  with jax.numpy_dtype_promotion("standard"):  # optax's own code promotes
    yield


def source_of(texts, seed):
  return training_batches.Supervised(texts, texts, ((10, 10),), 4, seed)


@dataclasses.dataclass
class Toy:
  """All that a run of a tiny network needs; also the script that is killed
  below.
  """

  config: training.TrainConfig

  def __post_init__(self):
    rng = np.random.default_rng(0)
    self.source = source_of(
      [[*rng.integers(3, 20, n).tolist(), 1] for n in rng.integers(2, 9, 24)],
      seed=1,
    )
    self.module = network.Transformer(
      network.T5Config(
        vocab_size=20,
        emb_dim=8,
        num_heads=1,
        head_dim=8,
        mlp_dim=8,
        dropout_rate=0.1,
        num_encoder_layers=1,
        num_decoder_layers=2,
        one_hot_embedding=False,
      )
    )
    self.losses = {}

  def fit(self, output_dir, listener=None, evaluate=None):
    objective = objectives.LayerWeighted(sampled_layers=1)
    params = updates.init_params(self.module.config, seed=0)
    step, default = compiled(self.module, self.config, objective, self.source)
    state = updates.init_state(params, self.config, objective)
    listener = listener or training.Listener(on_step=self.note)
    evaluate = evaluate or default
    return loop.fit(
      state,
      self.source,
      step,
      evaluate,
      self.config,
      output_dir=output_dir,
      listener=listener,
    )

  def note(self, step, scalars):
    self.losses[step] = scalars["loss"]


_compiled = {}


def compiled(module, config, objective, source):
  """Update and validation, traced once for all runs of one configuration."""
  # Of a configuration, the update knows no more than this.
  key = module, config.num_steps, config.schedule, config.optimizer, config.seed
  if key not in _compiled:
    params = updates.init_params(module.config, seed=0)
    step = updates.make_train_step(module, config, objective, params)
    data = run.Data(source, {"toy": source}, {"toy": 1})
    _compiled[key] = step, run.evaluator(module, objective, data)
  return _compiled[key]


# log_every does not divide eval_every: windows must still not cross a
# checkpoint.
CONFIG = training.TrainConfig(num_steps=12, eval_every=5, log_every=3)

# Killed between the best checkpoint and the newest.
SCRIPT = """
import os, pathlib, signal, sys
from calm import training
from calm.training import loop
from tests import conftest
from tests.training import loop_test as t

conftest.compile_quickly(t.pytest.MonkeyPatch())
conftest.keep_programs(sys.argv[2])

save = loop._save

def save_and_die(manager, step, tree):
  if step == 10 and manager.directory.name == "checkpoints":
    os.kill(os.getpid(), signal.SIGKILL)
  save(manager, step, tree)

loop._save = save_and_die
note = lambda step, scalars: print(
  f"{step} {scalars['loss'].hex()}", flush=True
)
t.Toy(t.CONFIG).fit(pathlib.Path(sys.argv[1]), training.Listener(on_step=note))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(folder, toy, leaves at the end) of a run that nobody stopped; tests only
  read it.
  """
  folder = tmp_path_factory.mktemp("training") / "whole"
  toy = Toy(CONFIG)
  with jax.numpy_dtype_promotion("standard"):
    return folder, toy, leaves(toy.fit(folder))


def leaves(state):
  return jax.tree.leaves(jax.tree.map(np.asarray, state.params))


def same(state, expected):
  for left, right in zip(leaves(state), expected, strict=True):
    np.testing.assert_array_equal(left, right)


def test_a_run_that_was_killed_ends_as_if_it_never_was(
  whole, programs, tmp_path
):
  folder, uninterrupted, expected = whole
  environment = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "JAX_PLATFORMS": "cpu",
  }
  environment["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"
  killed = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(tmp_path), programs],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    cwd=REPOSITORY,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  pairs = map(str.split, killed.stdout.splitlines())
  seen = {int(step): float.fromhex(loss) for step, loss in pairs}
  assert list(seen) == [3, 5, 6, 9, 10]
  resumed = Toy(CONFIG)
  same(resumed.fit(tmp_path), expected)
  assert list(resumed.losses) == [6, 9, 10, 12]  # from the checkpoint of step 5
  assert seen | resumed.losses == uninterrupted.losses  # to the bit

  def read(run):
    return json.loads((run / "validation.json").read_text())

  assert read(tmp_path) == read(folder)


def test_early_stopping_returns_the_best_parameters(tmp_path):
  config = dataclasses.replace(CONFIG, eval_every=2, patience=2)
  values = iter([3.0, 1.0, 2.0, 1.5, 0.0])
  kept = []

  def evaluate(params):
    kept.append(jax.tree.map(np.array, params))
    return {"loss": next(values)}

  state = Toy(config).fit(tmp_path, evaluate=evaluate)
  # two validations without improvement
  assert len(kept) == 4 and int(state.step) == 8
  same(state, jax.tree.leaves(kept[1]))


@pytest.mark.parametrize(
  ("metric", "values", "best"),
  [("qa/loss", [2.0, 1.0, 3.0], 1), ("accuracy/layer_2", [0.1, 0.2, 0.3], 2)],
)
def test_losses_are_better_low_and_accuracies_high(metric, values, best):
  history = [{"step": step, metric: value} for step, value in enumerate(values)]
  assert loop.since_best(history, metric) == len(values) - 1 - best
  with pytest.raises(ValueError, match=rf"`stop_metric`.*'{metric}'.*'bleu'"):
    loop.since_best(history, "bleu")


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  config = dataclasses.replace(
    CONFIG, schedule=lambda steps: lambda step: jnp.nan
  )
  with pytest.raises(
    FloatingPointError, match=r"finite .* loss, got nan by step 3; lower the"
  ):
    Toy(config).fit(tmp_path)
  with pytest.raises(FloatingPointError, match="finite validation loss"):
    Toy(CONFIG).fit(tmp_path, evaluate=lambda params: {"loss": float("inf")})
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    OSError, match=r"`output_dir` to be a folder that can be written, got .*"
  ):
    loop.check_writable(tmp_path / "file" / "run")


IDENTIFIED = training.TrainConfig(
  20, training.Schedule(0.01, 1, final_fraction=1.0)
)


def check(path, reached, first=3, rows_seed=0, width=2, **change):
  source = source_of([[first, n, 1] for n in range(3, 20)], rows_seed)
  state = updates.TrainState(jnp.array(0), jnp.zeros(width), ())
  config = dataclasses.replace(IDENTIFIED, **change)
  loop.check_identity(path, config, source, state, reached)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"seed": 7}, "seed 0, now 7"),
    # A longer run decays more slowly: the steps that were made had other rates.
    (
      {"schedule": training.Schedule(0.01, 1), "num_steps": 40},
      r"learning rate 0\.01 at step",
    ),
    ({"first": 4}, "other data"),
    ({"rows_seed": 1}, "other data"),
    ({"width": 3}, "another model or optimizer"),
  ],
)
def test_another_rate_seed_data_or_model_is_refused(tmp_path, change, words):
  path = tmp_path / "run.json"
  check(path, 0)
  before = path.read_text()
  with pytest.raises(ValueError, match=words):
    check(path, 10, **change)
  assert path.read_text() == before
  check(path, 0, **change)  # nothing was made yet: it begins


def test_the_same_run_and_a_longer_one_at_a_constant_rate_go_on(tmp_path):
  path = tmp_path / "run.json"
  for change in ({}, {}, {"num_steps": 64}):
    check(path, 10, **change)
  path.unlink()  # a run of an earlier version
  check(path, 10, rows_seed=3)
  known = json.loads(path.read_text())
  for stored in (
    {},
    [],
    {**known, "batches": known["batches"][:2]},
    {**known, "batches": 3},
  ):
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="to be what a run was made with"):
      check(path, 10, rows_seed=3)
