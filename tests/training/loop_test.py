"""The trainer: exact after SIGKILL, stops early, and says what is wrong."""

import dataclasses
import gc
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

pytest.importorskip("orbax.checkpoint", reason="Orbax (the `train` extra) is not installed")

from calm import training
from calm.data import training_batches
from calm.t5 import network
from calm.training import loop, objectives


@pytest.fixture(autouse=True)
def collect_orphans():
  yield
  gc.collect()


REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def lenient_promotion():
  with jax.numpy_dtype_promotion("standard"):  # optax's own code promotes
    yield


@dataclasses.dataclass
class Toy:
  """All that a run of a tiny network needs; also the script that is killed below."""

  config: training.TrainConfig

  def __post_init__(self):
    rng = np.random.default_rng(0)
    texts = [[*rng.integers(3, 20, n).tolist(), 1] for n in rng.integers(2, 9, 24)]
    sequences = training_batches.Ragged(texts)
    bucket = (training_batches.Bucket(10, 10),)
    self.source = training_batches.Supervised(sequences, sequences, bucket, 4, seed=1)
    self.module = network.Transformer(
      network.T5Config(
        vocab_size=20, emb_dim=8, num_heads=1, head_dim=8, mlp_dim=8, dropout_rate=0.1,
        num_encoder_layers=1, num_decoder_layers=2, one_hot_embedding=False,
      )
    )  # fmt: skip
    self.objective = objectives.LayerWeighted(sampled_layers=1)
    self.losses = {}

  def fit(self, output_dir, listener=None, evaluate=None):
    params = training.init_params(self.module.config, seed=0)
    step, default = compiled(self.module, self.config, self.objective, self.source.batch)
    evaluate = evaluate or default
    state = training.init_state(params, self.config, self.objective)
    listener = listener or training.Listener(on_step=self.note)
    return training.fit(
      state, self.source, step, evaluate, self.config, output_dir=output_dir, listener=listener
    )

  def note(self, step, scalars):
    self.losses[step] = scalars["loss"]


_compiled = {}


def compiled(module, config, objective, batch):
  """Update and validation, traced once for all runs of one configuration."""
  # Of a configuration, the update knows no more than this.
  parts = config.num_microbatches
  key = module, config.num_steps, config.schedule, config.optimizer, config.seed, parts
  if key not in _compiled:
    params = training.init_params(module.config, seed=0)
    step = training.make_train_step(module, config, objective, params)
    _compiled[key] = step, training.make_eval_fn(module, objective, [batch(0)])
  return _compiled[key]


# log_every does not divide eval_every: windows must still not cross a checkpoint.
CONFIG = training.TrainConfig(num_steps=12, eval_every=5, log_every=3)

SCRIPT = """
import os, pathlib, signal, sys
from calm import training
from tests.training import loop_test as t

def note(step, scalars):
  print(f"{step} {scalars['loss'].hex()}", flush=True)
  if step == int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)

t.Toy(t.CONFIG).fit(pathlib.Path(sys.argv[1]), training.Listener(on_step=note))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(folder, toy, leaves at the end) of a run that nobody stopped; tests only read it."""
  folder = tmp_path_factory.mktemp("training") / "whole"
  toy = Toy(CONFIG)
  with jax.numpy_dtype_promotion("standard"):
    return folder, toy, leaves(toy.fit(folder))


def run_until_killed(output_dir, step):
  environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
  environment["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"
  # As `calm train` does: what was compiled before the kill is not compiled again.
  environment["JAX_COMPILATION_CACHE_DIR"] = str(output_dir.parent / "xla")
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  return subprocess.run(
    [sys.executable, "-c", SCRIPT, str(output_dir), str(step)],
    env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY,
  )  # fmt: skip


def windows(output):
  pairs = [line.split() for line in output.splitlines()]
  return {int(step): float.fromhex(loss) for step, loss in pairs}


def leaves(state):
  return jax.tree.leaves(jax.tree.map(np.asarray, state.params))


def test_a_run_killed_twice_ends_as_if_it_never_was(whole, tmp_path):
  folder, uninterrupted, expected = whole
  first = run_until_killed(tmp_path / "killed", 3)
  assert first.returncode == -signal.SIGKILL, first.stderr
  second = run_until_killed(tmp_path / "killed", 9)
  assert second.returncode == -signal.SIGKILL, second.stderr
  resumed = Toy(CONFIG)
  state = resumed.fit(tmp_path / "killed")

  assert list(windows(first.stdout)) == [3]  # nothing saved yet: begins again
  assert list(windows(second.stdout)) == [3, 5, 6, 9]
  assert list(resumed.losses) == [6, 9, 10, 12]  # from the checkpoint of step 5
  seen = {**windows(first.stdout), **windows(second.stdout), **resumed.losses}
  assert seen == uninterrupted.losses  # to the bit
  for left, right in zip(leaves(state), expected, strict=True):
    np.testing.assert_array_equal(left, right)
  read = lambda run: json.loads((run / "validation.json").read_text())
  assert read(tmp_path / "killed") == read(folder)


def test_killed_between_the_best_and_the_newest_checkpoint(whole, tmp_path, monkeypatch):
  *_, expected = whole
  save = loop._save

  def save_and_die(manager, step, tree):
    if step == 10 and manager.directory.name == "checkpoints":
      raise KeyboardInterrupt
    save(manager, step, tree)

  monkeypatch.setattr(loop, "_save", save_and_die)
  with pytest.raises(KeyboardInterrupt):
    Toy(CONFIG).fit(tmp_path / "killed")
  monkeypatch.undo()
  state = Toy(CONFIG).fit(tmp_path / "killed")
  for left, right in zip(leaves(state), expected, strict=True):
    np.testing.assert_array_equal(left, right)


def test_a_finished_run_runs_no_further(whole):
  folder, _, expected = whole
  again = Toy(CONFIG)
  state = again.fit(folder)
  assert again.losses == {}
  for left, right in zip(leaves(state), expected, strict=True):
    np.testing.assert_array_equal(left, right)


def test_early_stopping_returns_the_best_parameters(tmp_path):
  config = dataclasses.replace(CONFIG, eval_every=2, patience=2)
  values = iter([3.0, 1.0, 2.0, 1.5, 0.0])
  kept = []

  def evaluate(params):
    kept.append(jax.tree.map(np.array, params))
    return {"loss": next(values)}

  state = Toy(config).fit(tmp_path, evaluate=evaluate)
  assert len(kept) == 4 and int(state.step) == 8  # two validations without improvement
  for left, right in zip(leaves(state), jax.tree.leaves(kept[1]), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
  ("metric", "values", "best"),
  [("qa/loss", [2.0, 1.0, 3.0], 1), ("accuracy/layer_2", [0.1, 0.2, 0.3], 2)],
)
def test_losses_are_better_low_and_accuracies_high(tmp_path, metric, values, best):
  history = training.History(tmp_path / "validation.json", metric, None)
  improved = [history.update(step, {metric: value}) for step, value in enumerate(values)]
  assert max(step for step, is_best in enumerate(improved) if is_best) == best


def test_an_unknown_stop_metric_lists_the_known_ones(tmp_path):
  history = training.History(tmp_path / "validation.json", "bleu", 1)
  with pytest.raises(ValueError, match=r"`stop_metric`.*'loss'.*'bleu'"):
    history.update(1, {"loss": 1.0})


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  config = dataclasses.replace(CONFIG, schedule=lambda steps: lambda step: jnp.nan)
  with pytest.raises(FloatingPointError, match=r"finite .* loss, got nan by step 3; lower the"):
    Toy(config).fit(tmp_path)
  with pytest.raises(FloatingPointError, match="finite validation loss"):
    Toy(CONFIG).fit(tmp_path, evaluate=lambda params: {"loss": float("inf")})
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"`output_dir` to be a folder that can be written, got .*"):
    training.check_writable(tmp_path / "file" / "run")


def test_another_model_in_the_folder_is_refused(whole):
  folder, *_ = whole
  other = Toy(CONFIG)
  wider = dataclasses.replace(other.module.config, mlp_dim=12)
  other.module = network.Transformer(wider)
  with pytest.raises(ValueError, match="give another `output_dir`"):
    other.fit(folder)


def test_schedule_warms_up_and_decays():
  rate = training.Schedule(peak=0.1, warmup_steps=10, final_fraction=0.1)(100)
  np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(100)], [0, 0.05, 0.1, 0.01])
  short = training.Schedule(peak=0.1, warmup_steps=10)(1)
  assert np.isfinite(float(short(0)))


CONSTANT = training.Schedule(peak=0.01, warmup_steps=1, final_fraction=1.0)
IDENTIFIED = training.TrainConfig(num_steps=20, schedule=CONSTANT)


def counting(seed=0, first=3):
  sequences = training_batches.Ragged([[first, n, 1] for n in range(3, 20)])
  return training_batches.Supervised(
    sequences, sequences, (training_batches.Bucket(4, 4),), 4, seed
  )


@pytest.mark.parametrize(
  ("change", "rows", "words"),
  [
    ({"seed": 7}, {}, "seed 0, now 7"),
    ({"schedule": training.Schedule(0.02, 1, 1.0)}, {}, r"learning rate 0\.01 at step"),
    # A longer run decays more slowly: the steps that were made had other rates.
    ({"schedule": training.Schedule(0.01, 1), "num_steps": 40}, {}, "learning rate"),
    ({}, {"first": 4}, "other data"),
    ({}, {"seed": 1}, "other data"),
  ],
)
def test_another_rate_seed_or_data_is_refused(tmp_path, change, rows, words):
  path = tmp_path / "run.json"
  loop.check_identity(path, loop.identity_of(IDENTIFIED, counting()), 0)
  before = path.read_text()
  other = loop.identity_of(dataclasses.replace(IDENTIFIED, **change), counting(**rows))
  with pytest.raises(ValueError, match=words):
    loop.check_identity(path, other, 10)
  assert path.read_text() == before
  loop.check_identity(path, other, 0)  # nothing was made yet: it begins


def test_the_same_run_and_a_longer_one_at_a_constant_rate_go_on(tmp_path):
  path = tmp_path / "run.json"
  for config in (IDENTIFIED, IDENTIFIED, dataclasses.replace(IDENTIFIED, num_steps=64)):
    loop.check_identity(path, loop.identity_of(config, counting()), 10)
  path.unlink()  # a run of an earlier version
  loop.check_identity(path, loop.identity_of(IDENTIFIED, counting(seed=3)), 10)
  path.write_text("{}")
  with pytest.raises(ValueError, match="to say what a run was made with"):
    loop.check_identity(path, loop.identity_of(IDENTIFIED, counting()), 10)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_steps", -3),
    ("num_steps", 0),
    ("patience", -1),
    ("eval_every", 0),
    ("log_every", 2.5),
  ],
)
def test_numbers_without_meaning_are_refused(name, value):
  with pytest.raises(ValueError, match=f"`{name}`"):
    training.TrainConfig(**{"num_steps": 3, name: value})
  assert training.TrainConfig(num_steps=np.int64(3), patience=1).patience == 1
