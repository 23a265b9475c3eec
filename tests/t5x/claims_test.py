"""What the README says works with T5X, tried with T5X's own parts."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.calibrate.generations import foreign
from calm.calibrate.generations.records import GenerationsError
from calm.exits import confidence
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS
collect_orphans = setup.collect_orphans
RULE = exits.DynamicExits(confidence.Classifier())


@pytest.fixture(autouse=True)
def random_generator():
  """T5X's parts set the generator of keys; the next test has the one before."""
  before = jax.config.jax_default_prng_impl
  yield
  jax.config.update("jax_default_prng_impl", before)


def in_pairs(batch):
  """Rows 2i and 2i + 1 one behind the other, as seqio packs examples."""
  made = {name: x.reshape(x.shape[0] // 2, -1) for name, x in batch.items()}
  for side, tokens in (("encoder", "encoder_input"), ("decoder", "decoder_target")):
    length = batch[f"{tokens}_tokens"].shape[1]
    number = jnp.repeat(jnp.arange(1, 3), length)[None, :]
    made[f"{side}_segment_ids"] = jnp.where(made[f"{tokens}_tokens"] > 0, number, 0)
    places = jnp.tile(jnp.arange(length), 2)[None, :]
    made[f"{side}_positions"] = jnp.broadcast_to(places, made[f"{tokens}_tokens"].shape)
  return made


def test_examples_that_are_packed_have_the_loss_that_they_have_apart():
  toy = engine.toy()
  model, batch = setup.model(toy, rule=RULE), setup.training_batch(toy)
  loss = setup.compiled(lambda params, batch: model.loss_fn(params, batch, None)[0])
  apart, packed = (loss(setup.params(toy), x) for x in (batch, in_pairs(batch)))
  np.testing.assert_allclose(packed, apart, rtol=1e-5)
  mixed = {k: v for k, v in in_pairs(batch).items() if "segment" not in k}
  assert not np.allclose(loss(setup.params(toy), mixed), apart, rtol=1e-3), "meta: they attend"


def test_microbatches_add_up_to_the_gradient_of_the_batch():
  from t5x import trainer

  toy = engine.toy()
  still = models.network.Transformer(dataclasses.replace(toy.config, dropout_rate=0.0))
  model, batch = setup.model(toy, rule=RULE, module=still), setup.training_batch(toy)
  state = types.SimpleNamespace(params=setup.params(toy), flax_mutables=None)

  def grads(batch, number):
    key = jax.random.key(0)
    return trainer.accumulate_grads_microbatched(model, state, batch, key, number)[0]

  whole, parts = (setup.compiled(lambda x, n=n: grads(x, n))(batch) for n in (None, 4))
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole)) > 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), whole, parts
  )


def test_t5x_hardware_generator_drops_out_and_samples():
  from t5x import decoding, utils

  utils.set_hardware_rng_ops()
  toy = engine.toy()
  sampled = lambda **given: decoding.temperature_sample(temperature=1.0, topk=0, **given)
  model = setup.model(toy, rule=RULE, threshold=0.5, decode_fn=sampled)
  run = setup.compiled(
    lambda params, batch, key: model.predict_batch_with_aux(params, batch, rng=key)
  )
  inputs = setup.params(toy), setup.batch()
  one, again, other = (run(*inputs, jax.random.PRNGKey(seed)) for seed in (0, 0, 1))
  assert jax.random.PRNGKey(0).shape == (4,), "meta: the generator is another than threefry"
  np.testing.assert_array_equal(one[0], again[0])
  assert not np.array_equal(one[0], other[0])
  assert len(set(np.asarray(one[1]["exit_layers"]).ravel().tolist()) - {0}) > 1


def test_a_file_of_all_decodes_is_refused_and_one_of_the_best_is_read(tmp_path):
  """What `t5x/infer.py` writes in `predict_with_aux` mode, by its own function."""
  import seqio
  import tensorflow as tf
  from t5x import decoding, infer

  toy = engine.toy()
  model = setup.model(toy, rule=RULE, threshold=0.5, decode_fn=decoding.beam_search)
  rows = tf.data.Dataset.from_tensor_slices({"inputs_pretokenized": ["a", "b"]})

  def written(every: bool):
    predict = lambda params, batch: model.predict_batch_with_aux(
      params, batch, num_decodes=3, return_all_decodes=every
    )
    inputs = setup.params(toy), setup.batch(engine.PROMPTS[:2])
    made = jax.device_get(setup.compiled(predict)(*inputs))
    path, words = tmp_path / f"{every}.jsonl", seqio.ByteVocabulary()
    infer.write_inferences_to_file(str(path), made, rows, "predict_with_aux", words)
    return path

  with pytest.raises(GenerationsError, match=r"one decode.*return_all_decodes = False"):
    foreign.read_predictions(written(every=True))
  path = written(every=False)
  _, records = foreign.read_predictions(path)
  lines = [json.loads(line)["prediction"] for line in path.read_text("utf-8").splitlines()]
  assert [record.prediction for record in records] == lines and len(lines) == 2
