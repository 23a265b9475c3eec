"""Full depth in T5X's own loop: our model against T5X's own network, side by side.

  python scripts/benchmark_t5x.py --batch_sizes 1 8 --repeats 5

Random weights of a T5 1.1 shape, float32, greedy, every step of the length run. Medians of
repeats that take turns, in one process. Needs T5X.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from t5x import adafactor, decoding  # pyright: ignore[reportMissingImports]
from t5x import models as t5x_models  # pyright: ignore[reportMissingImports]
from t5x.examples.t5 import network as t5x_network  # pyright: ignore[reportMissingImports]

from calm.t5x import models

SHAPES = {
  "tiny": dict(emb_dim=128, num_heads=4, head_dim=32, mlp_dim=256, num_layers=4),
  "small": dict(emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024, num_layers=8),
}
VOCABULARY = 32128
NO_EOS = 2**30  # an id that is never emitted: every step runs


def module_of(shape: str) -> Any:
  sizes = dict(SHAPES[shape])
  layers = sizes.pop("num_layers")
  config = t5x_network.T5Config(
    vocab_size=VOCABULARY,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
    **sizes,
  )
  return t5x_network.Transformer(config)


def runners(shape: str, batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
  """Name -> one timed call, compiled already."""
  words = seqio.PassThroughVocabulary(VOCABULARY, 1)
  sample = functools.partial(decoding.temperature_sample, temperature=0.0, topk=0)
  arguments = (module_of(shape), words, words, adafactor.Adafactor(learning_rate=1e-3))
  kinds = {
    "T5X's network, T5X's loop": t5x_models.EncoderDecoderModel(*arguments, sample),
    "our model, T5X's loop": models.EncoderDecoderModel(*arguments, sample),
    "our model, greedy_decode": models.EncoderDecoderModel(*arguments, models.greedy_decode),
  }
  shapes = {name: array.shape for name, array in batch.items()}
  params = kinds["our model, T5X's loop"].get_initial_variables(jax.random.key(0), shapes)
  params = jax.tree.map(jnp.asarray, dict(params["params"]))
  made = {}
  for name, model in kinds.items():
    tree = params
    if name.startswith("T5X"):
      decoder = {k: v for k, v in params["decoder"].items() if k != "exit_classifier"}
      tree = {**params, "decoder": decoder}
    predict = lambda p, b, model=model: model.predict_batch_with_aux(
      p, b, decoder_params={"eos_id": NO_EOS}
    )
    made[name] = functools.partial(jax.jit(predict), tree, batch)
    jax.block_until_ready(made[name]())
  return made


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
  parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--input_length", type=int, default=128)
  parser.add_argument("--steps", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=5)
  arguments = parser.parse_args()
  for size in arguments.batch_sizes:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCABULARY - 200, (size, arguments.input_length))
    decoder = jnp.zeros((size, arguments.steps), jnp.int32)
    batch = {"encoder_input_tokens": jnp.asarray(tokens), "decoder_input_tokens": decoder}
    times: dict[str, list[float]] = {}
    run = runners(arguments.shape, batch)
    for _ in range(arguments.repeats):
      for name, call in run.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.setdefault(name, []).append(time.perf_counter() - start)
    base = statistics.median(times["T5X's network, T5X's loop"])
    for name, seconds in times.items():
      median = statistics.median(seconds)
      step = 1000 * median / arguments.steps
      print(f"{arguments.shape} B={size} {name}: {step:.2f} ms a step, {base / median:.2f}x")


if __name__ == "__main__":
  main()
