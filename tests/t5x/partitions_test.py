"""Eight virtual devices generate what one generates, data-parallel and model-parallel."""

import json
import subprocess
import sys

import numpy as np
import pytest

from calm import exits
from calm.exits import confidence
from tests import engine
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.MARKS

THRESHOLDS = (0.4, float("inf"))
RULE = exits.DynamicExits(confidence.Softmax())
# Runs in a process of its own: the number of devices is fixed when JAX starts.
SCRIPT = """
import json, sys
import flax, jax, numpy as np
from t5x import partitioning, utils
from tests import engine
from tests.t5x import partitions_test as here, setup

toy = engine.toy(num_heads=4)
found = {}
for partitions in (1, 2, 4):
  # On a CPU T5X puts every device on its model axis, whatever num_partitions says.
  grid = np.array(jax.devices()).reshape(-1, partitions)
  partitioning.get_cpu_mesh = lambda: jax.sharding.Mesh(grid, ["data", "model"])
  partitioner = partitioning.PjitPartitioner(num_partitions=partitions)
  model = setup.model(toy, rule=here.RULE, decode_fn=here.models.greedy_decode)
  batch = {name: np.asarray(x) for name, x in setup.batch().items()}
  shapes = {name: x.shape for name, x in batch.items()}
  shapes["decoder_target_tokens"] = shapes["decoder_input_tokens"]
  init = model.get_initial_variables
  initializer = utils.TrainStateInitializer(None, init, shapes, partitioner)
  axes = initializer.train_state_axes.params
  place = partitioner.partition(lambda p: p, in_axis_resources=(None,), out_axis_resources=axes)
  params = place(flax.core.freeze(jax.tree.map(np.asarray, setup.params(toy))))
  kernel = params["decoder"]["layers_0"]["self_attention"]["query"]["kernel"]
  predict = lambda p, b, t: model.predict_batch_with_aux(p, b, decoder_params={"threshold": t})
  step = partitioner.partition(
    predict,
    in_axis_resources=(axes, partitioner.data_partition_spec, None),
    out_axis_resources=None,
  )
  found[partitions] = {"shard": list(kernel.addressable_shards[0].data.shape)}
  for threshold in here.THRESHOLDS:
    tokens, aux = jax.device_get(step(params, batch, np.float32(threshold)))
    found[partitions][str(threshold)] = [tokens.tolist(), aux["exit_layers"].tolist()]
print("FOUND" + json.dumps([jax.device_count(), found]))
"""


@pytest.fixture(scope="module")
def found():
  flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", SCRIPT],
    cwd=setup.REPOSITORY,
    env=setup.environment(XLA_FLAGS=flags),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  devices, by_partitions = json.loads(done.stdout.split("FOUND")[1])
  assert devices == 8
  return by_partitions


@pytest.mark.parametrize("partitions", ["1", "2", "4"])
def test_generations_are_those_of_one_device_up_to_ties(found, partitions):
  toy = engine.toy(num_heads=4)
  width = toy.config.num_heads * toy.config.head_dim
  assert found[partitions]["shard"] == [toy.config.emb_dim, width // int(partitions)]
  for threshold in THRESHOLDS:
    tokens, layers = map(np.array, found[partitions][str(threshold)])
    state = engine.run(toy, RULE, threshold)
    rows = engine.reference_rows(toy, RULE, threshold)
    for i in engine.agreeing_rows(rows, state.generation):
      at = rows[i].first_difference(tokens[i].tolist(), layers[i].tolist())
      assert at is None or rows[i].is_tie(at)
