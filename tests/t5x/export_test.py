"""A model for serving without its Python: `jax.export`, with any batch size."""

import jax
import numpy as np
import pytest
from jax import export

from calm import exits
from calm.exits import confidence, propagation
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS


LEARNED = exits.DynamicExits(confidence.State(), propagation=propagation.Learned())


@pytest.mark.parametrize("decode", ["ours", "beam", "learned"])
def test_a_round_trip_takes_any_batch_size(decode):
  from t5x import decoding

  decode_fn = decoding.beam_search if decode == "beam" else models.greedy_decode
  toy, more = engine.toy(), {}
  if decode == "learned":
    toy = engine.toy_for(LEARNED)
    more = {"rule": LEARNED, "module": models.network.Transformer(toy.config)}
  model = setup.model(toy, decode_fn=decode_fn, threshold=0.4, **more)
  params, batch = setup.params(toy), setup.batch()
  predict = jax.jit(model.predict_batch_with_exits)
  (rows,) = export.symbolic_shape("rows")
  symbolic = {
    name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()
  }
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  stored = export.export(predict)(like, symbolic).serialize()
  opened = export.deserialize(stored)
  expected = predict(params, batch)
  for size in (len(engine.PROMPTS), 3):
    part = {name: x[:size] for name, x in batch.items()}
    tokens, scores, layers = opened.call(params, part)
    np.testing.assert_array_equal(tokens, expected[0][:size])
    np.testing.assert_allclose(scores, expected[1][:size], atol=1e-4)
    np.testing.assert_array_equal(layers, expected[2][:size])
  assert 1 < np.mean(layers[layers > 0]) < 4
