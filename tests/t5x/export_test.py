"""A model for serving without its Python: `jax.export`, with any batch size."""

import subprocess
import sys

import jax
import numpy as np
from jax import export

from calm import exits
from calm.exits import confidence, propagation
from calm.t5 import parameters
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS


LEARNED = exits.DynamicExits(
  confidence.State(), propagation=propagation.Learned()
)


# What a server runs: JAX and files, nothing of this package.
SERVER = """
import sys, jax, numpy as np
folder = sys.argv[1]
given, flat = np.load(folder + "/batch.npz"), np.load(folder + "/params.npz")
params = {}
for path, leaf in flat.items():
  *above, name = path.split("/")
  node = params
  for part in above:
    node = node.setdefault(part, {})
  node[name] = leaf
from jax import export
opened = export.deserialize(bytearray(open(folder + "/exits.jax", "rb").read()))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"calm", "t5x", "flax", "seqio"}
made = opened.call(params, dict(given))
np.savez(folder + "/made.npz", *made)
"""


def test_an_artefact_is_served_by_a_fresh_process_for_any_batch_size(tmp_path):
  toy = engine.toy_for(LEARNED)
  given = {"rule": LEARNED, "module": models.network.Transformer(toy.config)}
  model = setup.model(
    toy, decode_fn=models.greedy_decode, threshold=0.4, **given
  )
  params = setup.params(toy)
  batch = setup.batch()
  predict = jax.jit(model.predict_batch_with_exits)
  (rows,) = export.symbolic_shape("rows")
  symbolic = {
    name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    for name, x in batch.items()
  }
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  stored = export.export(predict)(like, symbolic).serialize()
  (tmp_path / "exits.jax").write_bytes(stored)
  np.savez(
    tmp_path / "params.npz", **parameters.flatten(jax.device_get(params))
  )
  expected = predict(params, batch)
  for size in (len(engine.PROMPTS), 3):
    np.savez(
      tmp_path / "batch.npz", **{name: x[:size] for name, x in batch.items()}
    )
    server = [sys.executable, "-c", SERVER, str(tmp_path)]
    done = subprocess.run(
      server, env=setup.environment(), cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    tokens, scores, layers = np.load(tmp_path / "made.npz").values()
    np.testing.assert_array_equal(tokens, expected[0][:size])
    np.testing.assert_allclose(scores, expected[1][:size], atol=1e-4)
    np.testing.assert_array_equal(layers, expected[2][:size])
  assert 1 < np.mean(layers[layers > 0]) < 4
