"""Makes `t5x_legacy.zip`, `t5x_orbax.zip` and `t5x_checkpoints.npz` with the real T5X.

Needs T5X (https://github.com/google-research/t5x) with airio and jestimator on the import path;
the tests that read the files need none of them. Run from the repository root:

  JAX_PLATFORMS=cpu python tests/golden/make_t5x_checkpoints.py

A tiny T5 1.1 of T5X's own network with its Adafactor, saved at step 7 by both checkpointers:
`legacy.zip` holds `checkpoint_7/` (a msgpack beside zarr arrays; parameters in bfloat16, as T5X
saves on request), `orbax.zip` holds `checkpoint_7/` (Orbax, parameters in float32). The npz
holds the same parameters by "/"-joined path, and `logits` of `tokens` [1, 4] fed on all sides.
"""

import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from t5x import adafactor, checkpoints, models, partitioning, utils
from t5x.examples.t5 import network

HERE = pathlib.Path(__file__).parent
STEP = 7
CONFIG = network.T5Config(
  vocab_size=32,
  emb_dim=8,
  num_heads=2,
  num_encoder_layers=1,
  num_decoder_layers=2,
  head_dim=4,
  mlp_dim=12,
  mlp_activations=("gelu", "linear"),
)


def make_state(params: dict, module) -> tuple:
  """(partitioner, train state) as `t5x/train.py` has them, at step STEP."""
  optimizer_def = adafactor.Adafactor(
    learning_rate=1e-3, logical_factor_rules=adafactor.standard_logical_factor_rules()
  )
  model = models.EncoderDecoderModel(module, None, None, optimizer_def)
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  shapes = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, 4)}
  shapes |= {"decoder_target_tokens": (1, 4)}
  initializer = utils.TrainStateInitializer(
    optimizer_def=optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes=shapes,
    partitioner=partitioner,
  )
  state = initializer.from_scratch(jax.random.key(0))
  state = state.replace_params(jax.tree.map(jnp.asarray, params))
  return partitioner, state.replace_step(jnp.asarray(STEP, jnp.int32))


def draw_params(module, rng: np.random.RandomState) -> dict:
  tokens = jnp.ones((1, 4), jnp.int32)
  init = module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)
  flat = traverse_util.flatten_dict(init["params"], sep="/")
  # Representable in bfloat16, so that both files hold the same parameters exactly.
  drawn = {
    path: np.asarray(0.5 * rng.standard_normal(flat[path].shape), jnp.bfloat16)
    for path in sorted(flat)
  }
  return {path: leaf.astype(np.float32) for path, leaf in drawn.items()}


def main() -> None:
  module, rng = network.Transformer(CONFIG), np.random.RandomState(0)
  flat = draw_params(module, rng)
  params = traverse_util.unflatten_dict(flat, sep="/")
  partitioner, state = make_state(params, module)
  makers = {
    "legacy": (checkpoints.Checkpointer, jnp.bfloat16),
    "orbax": (checkpoints.OrbaxCheckpointManagerInterface, jnp.float32),
  }
  for name, (maker, dtype) in makers.items():
    with tempfile.TemporaryDirectory() as directory:
      saver = maker(train_state=state, partitioner=partitioner,
                    **{"directory" if name == "orbax" else "checkpoints_dir": directory},
                    save_dtype=dtype)  # fmt: skip
      saver.save(state)
      if name == "orbax":
        saver.wait_until_finished()
      shutil.make_archive(str(HERE / f"t5x_{name}"), "zip", directory)
  tokens = np.array([[3, 9, 30, 1]], np.int32)
  logits = module.apply({"params": params}, tokens, tokens, tokens, enable_dropout=False)
  np.savez_compressed(
    HERE / "t5x_checkpoints.npz", tokens=tokens, logits=np.asarray(logits), **flat
  )


if __name__ == "__main__":
  main()
