"""Prompts over eight virtual CPU devices: the same results as on one."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from calm import checkpoints, inference
from calm.data import vocabulary
from calm.decode import sharded
from calm.t5 import network
from tests import toys

# Run by a fresh interpreter: the number of devices is fixed when JAX starts.
CHILD = """
import json, sys
import jax, jax.numpy as jnp
from calm import exits, inference
from calm.decode import sharded
from calm.decode.program import Program
from calm.exits import confidence, propagation

texts = ["a", "some words", "other words", "more of them"] * 2
options = {"measure": "classifier", "max_decode_length": 6, "batch_size": 2}
many = inference.load(sys.argv[2], num_devices=8, **options)
one = many.with_options(num_devices=1)
found = {"devices": jax.device_count()}
made = [model.generate(texts, threshold=0.6) for model in (one, many)]
told = lambda outputs: [[o.tokens, o.exit_layers] for o in outputs]
found["outputs"] = list(map(told, made))
found["procedures"] = one.procedure == many.procedure

from tests import engine

rule = exits.DynamicExits(
  confidence.Classifier(), propagation=propagation.Learned()
)
toy = engine.toy_for(rule)
program = sharded.ShardedProgram(Program(toy.config, rule, 4), 8)
weights = sharded.replicate(toy.weights, program.num_devices)
encoded = program.encode(weights, jnp.ones((11, 6), jnp.int32))
rows = program.decode(
  weights, encoded, jnp.ones(11, bool), jnp.linspace(0.0, 1.0, 11)
)
alone = program.program.decode(
  toy.weights,
  jax.device_get(encoded),
  jnp.ones(16, bool),
  jnp.linspace(0.0, 1.5, 16),
)
arguments = (weights, encoded, jnp.ones(16, bool), jnp.asarray(0.9))
compiled = sharded.ShardedProgram._decode.lower(program, *arguments).compile()
found |= {
  "split": all(
    leaf.sharding.spec[0] == "prompts" for leaf in jax.tree.leaves(encoded)
  ),
  "a threshold a row": [
    rows.exit_layers.tolist(),
    alone.exit_layers[:11].tolist(),
  ],
  "tokens": [rows.tokens.tolist(), alone.tokens[:11].tolist()],
  "program": compiled.as_text(),
}
json.dump(found, open(sys.argv[1], "w"))
"""
COLLECTIVES = (
  r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\b"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("devices")
  path = folder / "found.json"
  words = vocabulary.ByteVocabulary(extra_ids=0)
  sizes = toys.Config(vocab_size=words.vocab_size, num_pieces=words.vocab_size)
  config = network.T5Config(**toys.network_fields(sizes))
  checkpoints.save(
    folder / "toy", toys.params(sizes, 1), config, vocabulary=words
  )
  # Not a number of devices: `load` asks for it.
  flags = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  )
  done = subprocess.run(
    [sys.executable, "-c", CHILD, str(path), str(folder / "toy")],
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(path.read_text())


def test_eight_devices_give_the_results_of_one(found):
  assert found["devices"] == 8
  assert found["procedures"]  # the number of devices is no part of them
  one, many = found["outputs"]
  assert one == many
  depths = {layer for _, exit_layers in one for layer in exit_layers}
  assert len(depths) > 1, (
    "every token left at the same layer: nothing was compared"
  )


def test_eight_devices_take_a_threshold_a_row(found):
  rows, alone = found["a threshold a row"]
  assert rows == alone and len({layer for row in rows for layer in row}) > 1
  assert len(set(map(tuple, found["tokens"][0]))) > 1
  assert found["tokens"][0] == found["tokens"][1]


def test_rows_are_split_and_nothing_is_exchanged(found):
  assert found["split"] and "while" in found["program"]
  assert not re.search(COLLECTIVES, found["program"])


def test_more_devices_than_there_are_is_refused():
  count = jax.local_device_count() + 1
  with pytest.raises(
    ValueError, match=r"Expected `num_devices` in 1 .* JAX_NUM_CPU_DEVICES"
  ):
    sharded.mesh(count)
  with pytest.raises(ValueError, match="Expected `num_devices` to be in 1"):
    inference.DecodeOptions(num_devices=0)
