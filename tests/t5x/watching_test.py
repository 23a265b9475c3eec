"""Exits out of T5X's own sampling loop, in one pass: those that a second reading finds."""

import functools

import gin
import jax
import numpy as np
import pytest

from calm.t5x import loops
from tests import engine
from tests.t5x import models_test, setup

pytestmark = setup.MARKS
setup.import_models()


def unchanged(state):
  """Somebody's own callback: where there is one, nothing is watched."""
  return state


def prediction(sample, run_by: str = "deferred", **options):
  """(function of params, batch and options; the options)."""
  model = setup.model(engine.toy(), decode_fn=sample, engine=models_test.ENGINES[run_by])
  given = {**models_test.lambdas(0.4), "decode_rng": jax.random.key(3), **options}
  predict = functools.partial(
    model.predict_batch_with_aux, num_decodes=3, return_all_decodes=True
  )
  return (lambda params, batch, told: predict(params, batch, decoder_params=told)), given


def num_loops(function, *inputs) -> int:
  return str(jax.make_jaxpr(function)(*inputs)).count("while[")


# Name -> (what the loop is told, what the call tells it).
LOOPS = {
  "sampled": ({"temperature": 0.7, "topk": 5}, {}),
  "unscored": ({"temperature": 0.0, "topk": 0}, {}),
  "few steps": ({"temperature": 0.7, "topk": 0}, {"max_decode_steps": 3}),
}


@pytest.mark.parametrize("run_by", ["eager", "deferred"])
@pytest.mark.parametrize("name", LOOPS)
def test_they_are_those_of_replay(name, run_by):
  from t5x import decoding

  told, options = LOOPS[name]
  sample = functools.partial(decoding.temperature_sample, **told)
  inputs = setup.params(engine.toy()), setup.batch()
  found = []
  for callback in ({}, {"state_callback_fn": unchanged}):
    function, given = prediction(functools.partial(sample, **callback), run_by, **options)
    static = given.pop("max_decode_steps", None)
    steps = {} if static is None else {"max_decode_steps": static}
    traced = lambda params, batch, given, f=function, s=steps: f(params, batch, {**given, **s})
    run = models_test.compiled(traced)
    found.append((run(*inputs, given), num_loops(traced, *inputs, given)))
  ((decodes, watched), once), ((again, replayed), twice) = found
  assert once < twice, "one loop less"
  np.testing.assert_array_equal(decodes, again)
  assert set(watched) == set(replayed)
  for key, expected in replayed.items():
    models_test.assert_close(watched[key], expected)
  np.testing.assert_array_equal(watched["exit_layers"], replayed["exit_layers"])
  layers = np.asarray(watched["exit_layers"])
  assert 1 < layers[layers > 0].mean() < 4 and (layers == 0).any()


def test_only_the_sampling_of_t5x_is_watched_and_only_where_nobody_else_does():
  from t5x import decoding

  sampling = decoding.temperature_sample
  watch = functools.partial(loops.watch, sampling=sampling, options={})
  assert isinstance(watch(sampling), loops.Watch)
  assert isinstance(watch(functools.partial(sampling, topk=1)), loops.Watch)
  assert watch(decoding.beam_search) is None
  assert watch(functools.partial(sampling, state_callback_fn=unchanged)) is None
  assert loops.watch(sampling, sampling, {"state_callback_fn": unchanged}) is None
  try:
    gin.parse_config(
      "from __gin__ import dynamic_registration\nfrom t5x import decoding\n"
      "from tests.t5x import watching_test\n"
      "decoding.temperature_sample.state_callback_fn = @watching_test.unchanged"
    )
    configured = gin.get_configurable(sampling)
    assert watch(configured) is None
    gin.clear_config()
    assert isinstance(watch(configured), loops.Watch)
  finally:
    gin.clear_config()
