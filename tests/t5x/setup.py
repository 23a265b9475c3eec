"""Toy models in T5X: ours and T5X's own over the same parameters; skips where
T5X is absent.
"""

import functools
import importlib.util
import os
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import engine, toys

REASON = (
  "needs T5X, which is installed from its own repository (see "
  "configs/README.md)"
)
REPOSITORY = pathlib.Path(__file__).parents[2]
LENGTH = engine.LENGTH
MARKS = [pytest.mark.t5x, pytest.mark.filterwarnings("ignore")]
ORBAX = [*MARKS, pytest.mark.usefixtures("collect_orphans")]


@pytest.fixture(autouse=True)
def random_generator():
  """T5X's parts set the generator of keys; the next test has the one before."""
  before = jax.config.jax_default_prng_impl
  yield
  jax.config.update("jax_default_prng_impl", before)


def import_models() -> Any:
  """calm.t5x.models; its import runs T5X's, which warns. Skips the module
  without T5X.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return pytest.importorskip("calm.t5x.models", reason=REASON)


def t5x_root() -> pathlib.Path:
  """The folder that holds the package `t5x`."""
  spec = importlib.util.find_spec("t5x")
  assert spec is not None and spec.origin is not None
  return pathlib.Path(spec.origin).parents[1]


def environment(**variables: str) -> dict[str, str]:
  """Of a process of T5X's own: without the tests' strictness, and with T5X
  where it is here.
  """
  paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
  for name in ("JAX_NUMPY_RANK_PROMOTION", "JAX_NUMPY_DTYPE_PROMOTION"):
    env.pop(name, None)
  return env


def compiled(function: Any) -> Any:
  """`jax.jit`: toys compile for long and compute in no time."""
  return jax.jit(
    function, compiler_options={"xla_backend_optimization_level": 0}
  )


@functools.cache
def vocabulary(size: int, eos_id: int = 1) -> Any:
  import seqio

  return seqio.PassThroughVocabulary(size, eos_id)


def t5x_module(toy: engine.Toy) -> Any:
  """T5X's own network of a toy's sizes."""
  from t5x.examples.t5 import network

  names = [
    field for field in network.T5Config.__dataclass_fields__ if field != "dtype"
  ]
  given = {name: getattr(toy.config, name) for name in names}
  return network.Transformer(
    network.T5Config(dtype=jnp.dtype(toy.config.dtype), **given)
  )


def model(
  toy: engine.Toy, *, pieces: int | None = None, **arguments: Any
) -> Any:
  """Our model from T5X's module; `arguments` are those of
  `EncoderDecoderModel`.
  """
  from t5x import adafactor

  models = import_models()
  words = vocabulary(pieces or toy.sizes.num_pieces)
  arguments = {
    "optimizer_def": adafactor.Adafactor(learning_rate=1e-3),
    **arguments,
  }
  return models.EncoderDecoderModel(
    arguments.pop("module", t5x_module(toy)), words, words, **arguments
  )


def t5x_model(toy: engine.Toy, **arguments: Any) -> Any:
  """T5X's own model over T5X's own network."""
  from t5x import adafactor
  from t5x import models as t5x_models

  words = vocabulary(toy.sizes.vocab_size)
  return t5x_models.EncoderDecoderModel(
    t5x_module(toy),
    words,
    words,
    adafactor.Adafactor(learning_rate=1e-3),
    **arguments,
  )


def params(toy: engine.Toy) -> dict[str, Any]:
  """The toy's parameters as T5X holds them, on the device."""
  return jax.tree.map(jnp.asarray, toy.params)


def t5x_params(toy: engine.Toy) -> dict[str, Any]:
  """The toy's parameters without the parts that T5X's network does not have."""
  tree = params(toy)
  decoder = {
    part: x
    for part, x in tree["decoder"].items()
    if not part.startswith("exit_")
  }
  return {**tree, "decoder": decoder}


def batch(
  prompts: np.ndarray = engine.PROMPTS, length: int = LENGTH
) -> dict[str, Any]:
  """An inference batch; the decoder's tokens matter as a prefix only."""
  return {
    "encoder_input_tokens": jnp.asarray(prompts),
    "decoder_input_tokens": jnp.zeros((len(prompts), length), jnp.int32),
  }


def training_batch(
  toy: engine.Toy, rows: int = 8, seed: int = 5
) -> dict[str, Any]:
  """Teacher-forced targets with padding, and loss weights."""
  targets = toys.prompts(
    seed, batch=rows, length=LENGTH, num_pieces=toy.sizes.num_pieces
  )
  inputs = toys.prompts(
    seed + 1, batch=rows, length=12, num_pieces=toy.sizes.num_pieces
  )
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return {
    "encoder_input_tokens": jnp.asarray(inputs),
    "decoder_input_tokens": jnp.asarray(shifted),
    "decoder_target_tokens": jnp.asarray(targets),
    "decoder_loss_weights": jnp.asarray(targets > 0, jnp.float32),
  }
