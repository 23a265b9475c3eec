"""What `benchmark.py` decodes: models, prompts, and exits that are forced to
known depths.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits, inference
from calm.data import prompt_batches, prompt_files
from calm.decode import program
from calm.exits import confidence
from calm.t5 import network, parameters

GATED = {"mlp_activations": ("gelu", "linear")}
SIZES: Mapping[str, dict[str, Any]] = {
  "tiny": {
    **{
      "vocab_size": 96,
      "emb_dim": 16,
      "num_heads": 2,
      "head_dim": 8,
      "mlp_dim": 24,
    },
    **{"num_encoder_layers": 2, "num_decoder_layers": 4, **GATED},
  },
  "small": {
    **{
      "vocab_size": 32128,
      "emb_dim": 512,
      "num_heads": 6,
      "head_dim": 64,
      "mlp_dim": 1024,
    },
    **{"num_encoder_layers": 8, "num_decoder_layers": 8, **GATED},
  },
}
SHAPES = (*SIZES, "packed")
NO_EOS = -1  # random weights would end rows at random


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """One model, as ours and as what peers export from."""

  name: str  # one of `SHAPES`
  config: network.T5Config
  params: dict[str, Any]  # the T5X-shaped tree
  # the same laid out for decoding, with a shortlist
  weights: program.ModelWeights
  shortlist: tuple[int, ...]  # token ids, most likely first
  eos_id: int
  num_pieces: int  # columns of the head
  # the packed model's, for its prompts
  predictor: inference.Predictor | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
  """One block of the table."""

  shape: str  # one of `SHAPES`
  batch_size: int
  input_length: int  # of padded prompts
  decode_length: int  # steps, the size of the caches
  num_prompts: int = 16  # of the packed model; random prompts are one batch

  def __str__(self) -> str:
    sizes = f"B={self.batch_size}, input {self.input_length}"
    return f"{self.shape}, {sizes}, max_decode_length {self.decode_length}"


@functools.lru_cache(maxsize=1)
def load(shape: str, dtype: str, shortlist: int) -> Model:
  """The model of a shape; random weights are drawn as T5X initialises them."""
  if shape == "packed":
    predictor = inference.load("packed", measure="shortlist", dtype=dtype)
    assert predictor.options.shortlist is not None
    return Model(
      shape,
      predictor.config,
      dict(predictor.params),
      predictor.weights,
      predictor.options.shortlist,
      predictor.eos_id,
      predictor.vocabulary.vocab_size,
      predictor,
    )
  config = network.T5Config(**SIZES[shape], dtype=dtype, exit_probes=True)
  params = random_params(config)
  ids = tuple(range(3, 3 + min(shortlist, config.vocab_size // 2)))
  weights = program.model_weights(
    params, config, None, ids, native=dtype == "float32"
  )
  return Model(shape, config, params, weights, ids, NO_EOS, config.vocab_size)


# How weights may be read, and how that is called in a row.
READINGS: Mapping[str, str] = {
  "int8": "head in 8 bits",
  "layers": "layers and head in 8 bits",
  "both": "layers in 8 bits, head read so first",
  "encoder": "encoder and head in 8 bits",
  # of every exit layer, rank 16
  "learned": "translators and learned propagation",
  # not a reading: programs without functions of this process
  "xla": "all by XLA",
}
# Those of which the encoder's weights are read otherwise, too.
ENCODES = ("layers", "both", "encoder")


def read(model: Model, names: Iterable[str]) -> dict[str, Model]:
  """The model as it is stored, under '', and read in other ways, by how they
  are called.
  """
  return {"": model, **{READINGS[name]: _read(model, name) for name in names}}


def _read(model: Model, name: str) -> Model:
  params = model.params
  config = model.config
  dtypes: dict[str, Any] = {"native": config.dtype == "float32"}
  if name == "xla":
    dtypes = {}
  elif name == "learned":
    below = tuple(range(1, config.num_decoder_layers))
    config = dataclasses.replace(
      config,
      exit_translators=below,
      exit_propagation=below,
      exit_propagation_rank=16,
    )
    params = random_params(config)
  else:
    dtypes["head_dtype"] = None if name == "layers" else "int8"
    if name in ENCODES:
      dtypes["weights_dtype"] = None if name == "encoder" else "int8"
      dtypes["encoder_dtype"] = "int8"
  weights = program.model_weights(
    params, config, model.num_pieces, model.shortlist, **dtypes
  )
  return dataclasses.replace(
    model, config=config, params=params, weights=weights
  )


def random_params(config: network.T5Config, seed: int = 0) -> dict[str, Any]:
  """Random parameters of T5's scales, from numpy."""
  generator = np.random.default_rng(seed)

  def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("scale"):
      return np.ones(shape, np.float32)
    fan_in = 1 if path.endswith("embedding") else shape[0]
    if "/query/" in path:
      fan_in *= config.head_dim  # attention logits are not scaled in T5
    drawn = generator.standard_normal(shape, np.float32) / np.float32(
      np.sqrt(fan_in)
    )
    if path.endswith("logits_dense/kernel"):
      # padding and the end are never the argmax: all rows are full
      drawn[:, :3] = 0.0
    return drawn

  shapes = parameters.expected_shapes(config)
  return parameters.unflatten(
    {path: draw(path, shape) for path, shape in shapes.items()}
  )


def batches(model: Model, setting: Setting) -> list[np.ndarray]:
  """Prompts [batch, input_length] int32: real ones for the packed model."""
  if model.predictor is None:
    generator = np.random.default_rng(1)
    size = (setting.batch_size, setting.input_length)
    return [
      generator.integers(3, model.config.vocab_size, size).astype(np.int32)
    ]
  path = inference.PACKED / "prompts_unseen.jsonl"
  examples = prompt_files.open_prompts(path)[: setting.num_prompts]
  rows = prompt_batches.tokenize(
    [example.input for example in examples],
    model.predictor.vocabulary,
    prefix=model.predictor.options.task_prefix,
    max_input_length=setting.input_length,
    eos_id=model.eos_id,
  )
  padded = np.zeros((len(rows), setting.input_length), np.int32)
  for target, row in zip(padded, rows, strict=True):
    target[: len(row)] = row
  whole = len(rows) // setting.batch_size * setting.batch_size
  if not whole:
    raise ValueError(
      f"Expected at least {setting.batch_size} prompts for a batch, got "
      f"{len(rows)}; give more."
    )
  return list(
    padded[:whole].reshape(-1, setting.batch_size, setting.input_length)
  )


@dataclasses.dataclass(frozen=True)
class Trace:
  """A threshold schedule that says at which layer each token leaves, exactly.

  The traced threshold is the row's place in the trace, so that a row keeps its
  depths wherever an engine puts it. With `ForcedMeasure` only.
  """

  depths: tuple[int, ...]  # exit layers, taken in turn and repeated
  num_layers: int
  name = "trace"

  def __call__(self, threshold: jax.Array, generated: jax.Array) -> jax.Array:
    table = (jnp.asarray(self.depths, jnp.float32) - 0.5) / (
      self.num_layers + 1
    )
    return table[(threshold.astype(jnp.int32) + generated) % len(self.depths)]

  def depths_of(self, rows: int, length: int) -> np.ndarray:
    """The exit layer of every token, [rows, length]."""
    places = starts(rows).astype(int)[:, None] + np.arange(length)
    return np.asarray(self.depths)[places % len(self.depths)]


@dataclasses.dataclass(frozen=True)
class ForcedMeasure:
  """A measure whose cost is paid and whose answer is the layer: (layer +- 1/4)
  / (L + 1).

  The measured value moves the result within a quarter of a layer, so that a
  compiler has to compute it, and never over a threshold of `Trace`, which lies
  half a layer below.
  """

  inner: confidence.Measure
  num_layers: int

  def __getattr__(self, name: str) -> Any:
    return getattr(self.inner, name)  # its name, and what it uses

  @property
  def bound(self):
    inner = self.inner.bound
    return (
      None if inner is None else lambda view: self._level(view, inner(view))
    )

  def __call__(self, view: confidence.LayerView) -> jax.Array:
    return self._level(view, self.inner(view))

  def _level(self, view: confidence.LayerView, value: jax.Array) -> jax.Array:
    return (view.layer - 0.25 + 0.5 * jnp.clip(value, 0.0, 1.0)) / (
      self.num_layers + 1
    )


def forced(
  measure: str,
  depths: tuple[int, ...],
  config: network.T5Config,
  exit_layers: tuple[int, ...] | None = None,
) -> exits.DynamicExits:
  """The rule whose tokens leave at `depths` in turn, measuring at all exit
  layers.
  """
  inner = confidence.measure(measure)
  num_layers = config.num_decoder_layers
  kind: Any = "learned" if config.exit_propagation else "exit_state"
  return exits.DynamicExits(
    ForcedMeasure(inner, num_layers),  # pyright: ignore[reportArgumentType]
    Trace(depths, num_layers),  # pyright: ignore[reportArgumentType]
    allowed=exit_layers,
    propagation=kind,
  )


def starts(rows: int) -> np.ndarray:
  """Where each row begins in a trace."""
  return np.arange(rows, dtype=np.float32) * 61


def mixed_depths(
  num_layers: int, seed: int = 2, exit_layers: tuple[int, ...] | None = None
) -> tuple[int, ...]:
  """Geometric depths, mean about 2.4: most tokens shallow, some at full depth;
  each is raised to the next exit layer.
  """
  drawn = np.random.default_rng(seed).geometric(0.42, size=997)
  ends = (*(exit_layers or range(1, num_layers)), num_layers)
  return tuple(
    next((end for end in ends if end >= depth), num_layers) for depth in drawn
  )


def grid(options: argparse.Namespace) -> list[Setting]:
  """Every setting asked for; models outermost, so that each is loaded once."""
  lengths = options.input_lengths, options.decode_lengths
  product = itertools.product(options.shapes, *lengths, options.batch_sizes)
  return [
    Setting(s, b, i, d, max(options.num_prompts, b)) for s, i, d, b in product
  ]
