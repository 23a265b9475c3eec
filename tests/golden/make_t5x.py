"""Makes the files `t5x_*` of this folder from the real T5X: its network and its
checkpoints.

Needs T5X (https://github.com/google-research/t5x) with airio and jestimator on
the import path; the tests that read the files need none of them. From the
repository root: `JAX_PLATFORMS=cpu python -m tests.golden.make_t5x`

`t5x_network.npz`, `t5x_network.json`: two small models, `gated` (gated GELU, a
head of its own, as T5 1.1) and `tied` (ReLU, logits through the embedding, as
T5 1.0). The JSON has for each of them `config` (fields of `T5Config` without
dtype), `params` {path: shape} of T5X's own `init`, and `params_axes` {path:
axis names}; and `versions`. The npz has, under "gated/" or "tied/":

  params/PATH                                      drawn here; norm scales and
  biases are not 1 padded/ encoder_input_tokens, decoder_input_tokens,
  decoder_target_tokens, and encoded [batch, input, emb_dim], logits [batch,
  target, vocab], logits_bfloat16
  packed/ two rows of packed examples, with
  {encoder,decoder}_{segment_ids,positions}, logits long/encoder_input_tokens,
  long/encoded          1 x 160: beyond `relpos_max_distance` long/logits_last
  [1, 2, vocab]                   the last two of 160 decoder positions
Rows of padded targets end in 0; T5X masks those positions as queries too, so
logits there are stored but mean nothing.

`t5x_legacy.zip`, `t5x_orbax.zip`: a tiny T5 1.1 with T5X's Adafactor, saved at
step 7 by both checkpointers: `checkpoint_7/` as a msgpack beside zarr arrays
(parameters in bfloat16, as T5X saves on request), and Orbax's in float32.
`t5x_checkpoints.npz` has the same parameters by "/"-joined path, and `logits`
of `tokens` [1, 4] fed on all sides.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import t5x
from flax import traverse_util
from t5x import adafactor, checkpoints, models, partitioning, utils
from t5x.examples.t5 import network

from tests import toys

HERE = pathlib.Path(__file__).parent
SIZES = dict(
  vocab_size=64,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=24,
  dropout_rate=0.1,
)
SIZES |= dict(num_encoder_layers=2, num_decoder_layers=3)
CONFIGS = {
  "gated": network.T5Config(**SIZES, mlp_activations=("gelu", "linear")),
  "tied": network.T5Config(
    **SIZES, mlp_activations=("relu",), logits_via_embedding=True
  ),
}

STEP = 7
TINY = network.T5Config(vocab_size=32, **toys.SMALLEST)


def _flat(tree) -> dict:
  return traverse_util.flatten_dict(flax.core.unfreeze(tree), sep="/")


def draw_params(shapes: dict, rng: np.random.RandomState) -> dict:
  """Parameters on the scale of a trained T5: logits of a few units, visible
  position biases.
  """
  params = {}
  for path in sorted(shapes):
    shape = shapes[path]
    values = rng.standard_normal(shape)
    if path.endswith("scale"):
      values = 1 + 0.3 * values
    elif path.endswith("kernel"):
      values = values / np.sqrt(shape[0])
      if "query" in path:
        values = values / np.sqrt(SIZES["head_dim"])
    params[path] = values.astype(np.float32)
  return params


def padded_batch(rng: np.random.RandomState) -> dict:
  """Three rows of different lengths; the decoder input is the target shifted
  right.
  """
  inputs = np.zeros((3, 12), np.int32)
  targets = np.zeros((3, 10), np.int32)
  for row, (i, t) in enumerate([(12, 10), (7, 4), (1, 1)]):
    inputs[row, :i], targets[row, :t] = (
      rng.randint(3, 64, i),
      rng.randint(3, 64, t),
    )
  return dict(
    encoder_input_tokens=inputs,
    decoder_input_tokens=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    decoder_target_tokens=targets,
  )


def packed_batch(rng: np.random.RandomState) -> dict:
  """Two rows of packed examples (three and two), padding at the end of the
  first.
  """
  batch = {}
  for side, length, rows in [
    ("encoder", 14, [(5, 4, 3), (8, 6)]),
    ("decoder", 11, [(4, 2, 3), (6, 5)]),
  ]:
    tokens, segments, positions = (
      np.zeros((2, length), np.int32) for _ in range(3)
    )
    for row, lengths in enumerate(rows):
      start = 0
      for segment, n in enumerate(lengths, start=1):
        tokens[row, start : start + n] = rng.randint(3, 64, n)
        segments[row, start : start + n] = segment
        positions[row, start : start + n] = np.arange(n)
        start += n
    batch[f"{side}_{'input' if side == 'encoder' else 'target'}_tokens"] = (
      tokens
    )
    batch[f"{side}_segment_ids"], batch[f"{side}_positions"] = (
      segments,
      positions,
    )
  shifted = np.pad(batch["decoder_target_tokens"], ((0, 0), (1, 0)))[:, :-1]
  batch["decoder_input_tokens"] = np.where(
    batch["decoder_positions"] > 0, shifted, 0
  )
  return batch


def _under(name: str, arrays: dict) -> dict:
  return {f"{name}/{key}": value for key, value in arrays.items()}


def make(config, seed: int) -> tuple[dict, dict]:
  """One model's golden record: (what goes to the npz, what goes to the
  JSON).
  """
  model = network.Transformer(config)
  rng = np.random.RandomState(seed)
  padded = padded_batch(rng)
  packed = packed_batch(rng)
  init = model.init(
    {"params": jax.random.key(0)},
    **{k: jnp.asarray(v) for k, v in padded.items()},
    enable_dropout=False,
  )
  shapes = {
    path: list(leaf.shape) for path, leaf in _flat(init["params"]).items()
  }
  axes = {
    path: list(leaf.names) for path, leaf in _flat(init["params_axes"]).items()
  }
  params = draw_params(shapes, rng)
  variables = {"params": traverse_util.unflatten_dict(params, sep="/")}

  def logits(batch, config=config):
    return network.Transformer(config).apply(
      variables, **batch, enable_dropout=False
    )

  inputs = padded["encoder_input_tokens"]
  long = rng.randint(3, 64, (1, 160)).astype(np.int32)
  half = dataclasses.replace(config, dtype=jnp.bfloat16)

  def encode(x):
    return model.apply(variables, x, enable_dropout=False, method="encode")

  long_batch = dict(
    encoder_input_tokens=long,
    decoder_input_tokens=long,
    decoder_target_tokens=long,
  )
  arrays = (
    _under("params", params)
    | _under("padded", padded)
    | _under("packed", packed)
  )
  arrays |= {
    "padded/encoded": encode(inputs),
    "padded/logits": logits(padded),
    "padded/logits_bfloat16": logits(padded, half).astype(jnp.float32),
    "packed/logits": logits(packed),
    "long/encoder_input_tokens": long,
    "long/encoded": encode(long),
    "long/logits_last": logits(long_batch)[:, -2:],
  }
  fields = {k: v for k, v in dataclasses.asdict(config).items() if k != "dtype"}
  trees = dict(config=fields, params=shapes, params_axes=axes)
  return {key: np.asarray(value) for key, value in arrays.items()}, trees


def train_state(params: dict, module) -> tuple:
  """(partitioner, train state) as `t5x/train.py` has them, at step STEP."""
  optimizer_def = adafactor.Adafactor(
    learning_rate=1e-3,
    logical_factor_rules=adafactor.standard_logical_factor_rules(),
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


def make_checkpoints() -> None:
  module = network.Transformer(TINY)
  rng = np.random.RandomState(0)
  tokens = jnp.ones((1, 4), jnp.int32)
  init = module.init(
    jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
  )
  shapes = {
    path: leaf.shape for path, leaf in sorted(_flat(init["params"]).items())
  }

  # Representable in bfloat16, so that both files hold the same parameters
  # exactly.
  def half(shape):
    return np.asarray(0.5 * rng.standard_normal(shape), jnp.bfloat16)

  flat = {
    path: half(shape).astype(np.float32) for path, shape in shapes.items()
  }
  params = traverse_util.unflatten_dict(flat, sep="/")
  partitioner, state = train_state(params, module)
  makers = {
    "legacy": (checkpoints.Checkpointer, jnp.bfloat16),
    "orbax": (checkpoints.OrbaxCheckpointManagerInterface, jnp.float32),
  }
  for name, (maker, dtype) in makers.items():
    with tempfile.TemporaryDirectory() as directory:
      folder = "directory" if name == "orbax" else "checkpoints_dir"
      saver = maker(
        train_state=state,
        partitioner=partitioner,
        **{folder: directory},
        save_dtype=dtype,
      )
      saver.save(state)
      if name == "orbax":
        saver.wait_until_finished()
      shutil.make_archive(str(HERE / f"t5x_{name}"), "zip", directory)
  tokens = np.array([[3, 9, 30, 1]], np.int32)
  logits = module.apply(
    {"params": params}, tokens, tokens, tokens, enable_dropout=False
  )
  np.savez_compressed(
    HERE / "t5x_checkpoints.npz",
    tokens=tokens,
    logits=np.asarray(logits),
    **flat,
  )


def main() -> None:
  versions = dict(
    jax=jax.__version__, flax=flax.__version__, t5x=t5x.__version__
  )
  arrays = {}
  trees = {"versions": versions}
  for seed, (name, config) in enumerate(CONFIGS.items()):
    made, trees[name] = make(config, seed)
    arrays |= {f"{name}/{key}": value for key, value in made.items()}
  np.savez_compressed(HERE / "t5x_network.npz", **arrays)
  text = json.dumps(trees, indent=1)
  one_line = re.sub(
    r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text
  )
  (HERE / "t5x_network.json").write_text(one_line + "\n")
  make_checkpoints()


if __name__ == "__main__":
  main()
