"""Our network against golden files made with T5X's own (see
golden/make_t5x.py).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from calm.t5 import network

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TREES = json.loads((GOLDEN / "t5x_network.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "t5x_network.npz"))
MODELS = ("gated", "tied")
# Exit parts with the axis names that they may use (T5X's Adafactor knows no
# others).
LINEAR = {
  "kernel_axes": ["embed", "mlp_activations"],
  "bias_axes": ["mlp_activations"],
}
UP = {"kernel_axes": ["stack", "mlp_activations", "embed"]}
PROBE_FEATURES = {"features_axes": ["relpos_buckets", "mlp_activations"]}


def axes_of(**parts) -> dict[str, list[str]]:
  """{path: axes} of the parts of the decoder, by their paths with __ for /."""
  return {
    f"decoder/{part.replace('__', '/')}/{name}": axes
    for part, named in parts.items()
    for name, axes in named.items()
  }


EXIT_AXES = axes_of(exit_classifier=LINEAR)


def config_of(name: str, **changes) -> network.T5Config:
  return network.T5Config(**(TREES[name]["config"] | changes))


def part(prefix: str) -> dict[str, np.ndarray]:
  """Golden arrays under `prefix`, by what follows it."""
  return {
    k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)
  }


def batch_of(prefix: str) -> dict[str, np.ndarray]:
  fields = part(prefix)
  fed = ("tokens", "ids", "positions")
  return {k: jnp.asarray(v) for k, v in fields.items() if k.endswith(fed)}


def variables_of(name: str) -> dict:
  return {
    "params": traverse_util.unflatten_dict(part(f"{name}/params/"), sep="/")
  }


def flat(tree) -> dict:
  return traverse_util.flatten_dict(tree, sep="/")


def initialise(config: network.T5Config) -> dict:
  """Shapes of the whole `init`, computed without numbers."""
  batch = batch_of("gated/padded/")
  model = network.Transformer(config)
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), **batch, enable_dropout=False)
  )


def apply(name: str, batch: dict, **changes) -> np.ndarray:
  # The golden parameters hold no exit parts: the full-depth call must need
  # none.
  model = network.Transformer(config_of(name, **changes))
  return np.asarray(
    model.apply(variables_of(name), **batch, enable_dropout=False)
  )


@pytest.mark.parametrize("name", MODELS)
def test_params_and_axes_without_exit_parts_are_those_of_t5x(name):
  made = initialise(config_of(name, exit_classifier=False))
  params = flat(made["params"])
  assert {path: list(leaf.shape) for path, leaf in params.items()} == TREES[
    name
  ]["params"]
  assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
  axes = {
    path: list(leaf.names) for path, leaf in flat(made["params_axes"]).items()
  }
  assert axes == TREES[name]["params_axes"]


@pytest.mark.parametrize(
  ("changes", "added_axes"),
  [
    ({}, EXIT_AXES),
    (
      {"exit_probes": True},
      EXIT_AXES | axes_of(exit_probes=LINEAR | PROBE_FEATURES),
    ),
    (
      {"exit_translators": [2]},
      EXIT_AXES | axes_of(exit_translators__layers_1=LINEAR),
    ),
    (
      {
        "exit_propagation": (1,),
        "exit_propagation_rank": 4,
        "exit_classifier": False,
      },
      axes_of(
        exit_propagation__layers_0__down=LINEAR,
        exit_propagation__layers_0__up=UP,
      ),
    ),
  ],
)
def test_exit_parts_are_the_only_additions(changes, added_axes):
  made = initialise(config_of("gated", **changes))
  axes = {
    path: list(leaf.names) for path, leaf in flat(made["params_axes"]).items()
  }
  assert axes == TREES["gated"]["params_axes"] | added_axes
  added = set(flat(made["params"])) - set(TREES["gated"]["params"])
  assert added == {path.removesuffix("_axes") for path in added_axes}


@pytest.mark.parametrize(
  ("kind", "changes"),
  [("padded", {"one_hot_embedding": False}), ("padded", {}), ("packed", {})],
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_t5x(name, kind, changes):
  batch = batch_of(f"{name}/{kind}/")
  ours = apply(name, batch, **changes)
  real = batch["decoder_target_tokens"] > 0
  assert ours.dtype == np.float32
  np.testing.assert_allclose(
    ours[real], ARRAYS[f"{name}/{kind}/logits"][real], atol=1e-5
  )


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_activations_give_the_logits_of_t5x(name):
  batch = batch_of(f"{name}/padded/")
  real = batch["decoder_target_tokens"] > 0
  ours = apply(name, batch, dtype="bfloat16")[real]
  theirs = ARRAYS[f"{name}/padded/logits_bfloat16"][real]
  rounding = np.abs(theirs - ARRAYS[f"{name}/padded/logits"][real]).max()
  assert ours.dtype == np.float32
  # The same casts at the same places: nearer to T5X than bfloat16 is to
  # float32.
  assert np.abs(ours - theirs).max() < rounding


@pytest.mark.parametrize("name", MODELS)
def test_encoder_states_and_logits_equal_t5x_beyond_the_last_position_bucket(
  name,
):
  model = network.Transformer(config_of(name))
  for kind in ("padded", "long"):
    tokens = jnp.asarray(ARRAYS[f"{name}/{kind}/encoder_input_tokens"])
    ours = model.apply(
      variables_of(name), tokens, enable_dropout=False, method="encode"
    )
    real = tokens > 0
    theirs = ARRAYS[f"{name}/{kind}/encoded"]
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=1e-5)
  fields = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
  )
  theirs = ARRAYS[f"{name}/long/logits_last"]
  ours = apply(name, dict.fromkeys(fields, tokens))[:, -2:]
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
