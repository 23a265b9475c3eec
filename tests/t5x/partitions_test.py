"""Eight virtual devices generate what one generates, data-parallel and
model-parallel.
"""

import functools
import json
import subprocess
import sys
from typing import Any

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
# name -> partitions of the model, decode function, arguments of the model and
# of decoding.
GREEDY = {
  "data": (1, "ours", {}, {}),
  "data_model": (2, "ours", {}, {}),
  "kept_whole": (2, "ours", {"whole_decoder": True}, {}),
  "whole_mesh": (4, "ours", {}, {}),
}
OTHERS = {
  "sample": (2, "sample", {}, {"num_decodes": 2, "return_all_decodes": True}),
  "beam": (1, "beam", {}, {"num_decodes": 2, "return_all_decodes": True}),
}
# Weights, which are asked to be whole.
WEIGHTS_GATHERED = r"(?m) all-gather\(.*op_name=\"[^\"]*sharding_constraint"


def model(decode: str, **arguments: Any) -> Any:
  from t5x import decoding

  sample = functools.partial(
    decoding.temperature_sample, temperature=0.7, topk=5
  )
  known = {
    "ours": models.greedy_decode,
    "sample": sample,
    "beam": decoding.beam_search,
  }
  given = {"rule": RULE, "decode_fn": known[decode], **arguments}
  return setup.model(toy(), **given)


def toy() -> engine.Toy:
  return engine.toy_for(RULE, num_heads=4)


# Runs in a process of its own: the number of devices is fixed when JAX starts.
SCRIPT = """
import json, re
import flax, jax, numpy as np
from t5x import partitioning, utils
from tests import engine
from tests.decode import hlo
from calm.t5x import loops
from tests.t5x import partitions_test as here, setup

found = {}
runs = here.GREEDY | here.OTHERS
for name, (partitions, decode, arguments, options) in runs.items():
  # On a CPU T5X puts every device on its model axis, whatever
  # num_partitions says.
  grid = np.array(jax.devices()).reshape(-1, partitions)
  partitioning.get_cpu_mesh = lambda: jax.sharding.Mesh(grid, ["data", "model"])
  partitioner = partitioning.PjitPartitioner(num_partitions=partitions)
  model = here.model(decode, **arguments)
  # A decoder that is too large for one device.
  loops.APART_BYTES = 0 if name.endswith("whole_mesh") else 2**33
  params = setup.t5x_params(here.toy())
  batch = {name: np.asarray(x) for name, x in setup.batch().items()}
  shapes = {name: x.shape for name, x in batch.items()}
  shapes["decoder_target_tokens"] = shapes["decoder_input_tokens"]
  init = model.get_initial_variables
  initializer = utils.TrainStateInitializer(None, init, shapes, partitioner)
  axes = initializer.train_state_axes.params
  place = partitioner.partition(
    lambda p: p, in_axis_resources=(None,), out_axis_resources=axes
  )
  params = place(flax.core.freeze(jax.tree.map(np.asarray, params)))
  kernel = params["decoder"]["layers_0"]["self_attention"]["query"]["kernel"]
  given = lambda t: {"threshold": np.float32(t)}
  predict = lambda p, b, d: model.predict_batch_with_aux(
    p, b, decoder_params=d, **options
  )
  step = partitioner.partition(
    predict,
    in_axis_resources=(axes, partitioner.data_partition_spec, None),
    out_axis_resources=None,
  )
  run = step.lower(params, batch, given(0.4)).compile()
  kinds = ("all-", "collective", "reduce-scatter")
  text = run.as_text()
  moved = [x.opcode for x in hlo.in_loops(text) if x.opcode.startswith(kinds)]
  found[name] = {
    "shard": list(kernel.addressable_shards[0].data.shape),
    "collectives": sorted(set(moved)),
    "weights_gathered": len(re.findall(here.WEIGHTS_GATHERED, text)),
  }
  of = lambda made: [made[0].tolist(), made[1]["exit_layers"].tolist()]
  for threshold in here.THRESHOLDS:
    made = jax.device_get(step(params, batch, given(threshold)))
    found[name][str(threshold)] = of(made)
  if name not in here.GREEDY:
    one = jax.jit(predict)(setup.t5x_params(here.toy()), batch, given(0.4))
    found[name]["one"] = of(jax.device_get(one))
print("FOUND" + json.dumps([jax.device_count(), found]))
"""


@pytest.fixture(scope="module")
def found():
  flags = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0"
  )
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", SCRIPT],
    cwd=setup.REPOSITORY,
    env=setup.environment(XLA_FLAGS=flags),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  devices, by_name = json.loads(done.stdout.split("FOUND")[1])
  assert devices == 8
  return by_name


@pytest.mark.parametrize("name", GREEDY)
def test_generations_are_those_of_one_device_up_to_ties(found, name):
  config = toy().config
  parts = 1 if name == "kept_whole" else GREEDY[name][0]
  width = config.num_heads * config.head_dim
  assert found[name]["shard"] == [config.emb_dim, width // parts]
  for threshold in THRESHOLDS:
    tokens, layers = map(np.array, found[name][str(threshold)])
    state = engine.run(toy(), RULE, threshold)
    rows = engine.reference_rows(toy(), RULE, threshold)
    for i in engine.agreeing_rows(rows, state.generation):
      at = rows[i].first_difference(tokens[i].tolist(), layers[i].tolist())
      assert at is None or rows[i].is_tie(at)


@pytest.mark.parametrize("name", OTHERS)
def test_t5x_own_loops_search_as_on_one_device_and_draw_apart(found, name):
  tokens, layers = map(np.array, found[name]["0.4"])
  assert tokens.shape[:2] == (len(engine.PROMPTS), 2)
  assert len(
    {tuple(row) for row in tokens.reshape(-1, tokens.shape[-1])}
  ) > len(tokens)
  assert name != "beam" or found[name]["0.4"] == found[name]["one"]
  assert 1 < layers[layers > 0].mean() < 4


def test_nothing_is_exchanged_while_rows_are_decoded_nor_whole_weights_gathered(
  found,
):
  """But where the whole mesh decodes as one, which shows that the law can
  fail.
  """
  for name in (*GREEDY, *OTHERS):
    assert bool(found[name]["collectives"]) == name.endswith("whole_mesh")
  assert found["kept_whole"]["weights_gathered"] == 0
  assert found["data_model"]["weights_gathered"] > 8
