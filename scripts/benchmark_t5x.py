"""Our model against T5X's own network in T5X's own loop, side by side.

  python scripts/benchmark_t5x.py --batch_sizes 1 8 --repeats 5
  python scripts/benchmark_t5x.py --devices 4x1 8x1 2x2 --repeats 7

Random weights of a T5 1.1 shape, float32, greedy, every step of the length run. With
`--devices` (data x model): the model in the box and real prompts in T5X's partitioned step on
virtual CPU devices, a process for each mesh, to scripts/results/t5x_mesh.json. Medians of
repeats that take turns, in one process. Needs T5X.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio
from flax import core as flax_core
from t5x import adafactor, decoding, partitioning, utils  # pyright: ignore[reportMissingImports]
from t5x import models as t5x_models  # pyright: ignore[reportMissingImports]
from t5x.examples.t5 import network as t5x_network  # pyright: ignore[reportMissingImports]

from calm import checkpoints, exits, inference
from calm.exits import confidence
from calm.inference import options as options_lib
from calm.t5x import models

RESULTS = pathlib.Path(__file__).parent / "results" / "t5x_mesh.json"
PER_DEVICE = (1, 2)  # rows
THRESHOLD = 0.1
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
      decoder = {k: v for k, v in params["decoder"].items() if not k.startswith("exit_")}
      tree = {**params, "decoder": decoder}
    predict = lambda p, b, model=model: model.predict_batch_with_aux(
      p, b, decoder_params={"eos_id": NO_EOS}
    )
    made[name] = functools.partial(jax.jit(predict), tree, batch)
    jax.block_until_ready(made[name]())
  return made


def packed_batch(rows: int) -> dict[str, np.ndarray]:
  """Prompts of the box, as its own settings have them."""
  stored = options_lib.stored_options(inference.PACKED)
  options = inference.DecodeOptions(**stored)
  words: Any = checkpoints.load(inference.PACKED).vocabulary
  lines = (inference.PACKED / "prompts_calibration.jsonl").read_text("utf-8").splitlines()
  texts = [options.task_prefix + json.loads(line)["input"] for line in lines[:rows]]
  tokens = np.zeros((rows, options.max_input_length), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    ids = [*words.encode(text)[: len(row) - 1], 1]
    row[: len(ids)] = ids
  decoder = np.zeros((rows, options.max_decode_length), np.int32)
  return {"encoder_input_tokens": tokens, "decoder_input_tokens": decoder}


def packed_models() -> dict[str, tuple[Any, float | None]]:
  """Name -> (model, threshold)."""
  config = checkpoints.load(inference.PACKED).config
  fields = t5x_network.T5Config.__dataclass_fields__
  given = {name: getattr(config, name) for name in fields if name != "dtype"}
  module = t5x_network.Transformer(t5x_network.T5Config(dtype=jnp.float32, **given))
  words = seqio.PassThroughVocabulary(config.vocab_size, 1)
  arguments = (module, words, words, adafactor.Adafactor(learning_rate=1e-3))
  sample = functools.partial(decoding.temperature_sample, temperature=0.0, topk=0)
  ours = lambda measure, *layers: models.EncoderDecoderModel(
    *arguments, models.greedy_decode, rule=exits.DynamicExits(measure, allowed=layers or None)
  )
  softmax = ours(confidence.Softmax(), 3, 4)
  return {
    "T5X's network, T5X's loop": (t5x_models.EncoderDecoderModel(*arguments, sample), None),
    "ours, full depth": (softmax, None),
    f"ours, softmax after 3 and 4, at {THRESHOLD}": (softmax, THRESHOLD),
    f"ours, classifier, at {THRESHOLD}": (ours(confidence.Classifier()), THRESHOLD),
  }


def encode_only(model: Any, params: Any, batch: Any, options: Any) -> Any:
  """What every system does first."""
  tokens = batch["encoder_input_tokens"]
  variables = {"params": params}
  return model.module.apply(variables, tokens, enable_dropout=False, method="encode"), {}


def predict(model: Any, params: Any, batch: Any, options: Any) -> Any:
  return model.predict_batch_with_aux(params, batch, decoder_params=dict(options))


def partitioned(
  model: Any, threshold: float | None, batch: Any, partitioner: Any, function: Any = predict
) -> Any:
  """T5X's partitioned prediction of a batch by the model in the box, compiled already."""
  shapes = {name: x.shape for name, x in batch.items()}
  shapes["decoder_target_tokens"] = shapes["decoder_input_tokens"]
  init = model.get_initial_variables
  axes = utils.TrainStateInitializer(None, init, shapes, partitioner).train_state_axes.params
  params = checkpoints.load(inference.PACKED).params
  if "exit_classifier" not in axes["decoder"]:  # nor the probes
    decoder = {k: v for k, v in params["decoder"].items() if not k.startswith("exit_")}
    params = {**params, "decoder": decoder}
  place = partitioner.partition(lambda p: p, in_axis_resources=(None,), out_axis_resources=axes)
  options = {} if threshold is None else {"threshold": jnp.float32(threshold)}
  step = partitioner.partition(
    lambda params, batch: function(model, params, batch, options),
    in_axis_resources=(axes, partitioner.data_partition_spec),
    out_axis_resources=None,
  )
  run = functools.partial(step, place(flax_core.freeze(params)), batch)
  jax.block_until_ready(run())
  return run


def measure_mesh(mesh: str, repeats: int) -> list[dict[str, Any]]:
  """Rows of the table for one mesh, whose devices this process has."""
  data, model_axis = map(int, mesh.split("x"))
  grid = np.array(jax.devices()).reshape(data, model_axis)
  # On a CPU T5X puts every device on its model axis, whatever num_partitions says.
  partitioning.get_cpu_mesh = lambda: jax.sharding.Mesh(grid, ["data", "model"])
  partitioner = partitioning.PjitPartitioner(num_partitions=model_axis)
  found = []
  for per_device in PER_DEVICE:
    batch = packed_batch(per_device * grid.size)
    known = packed_models()
    runs = {name: partitioned(*x, batch, partitioner) for name, x in known.items()}
    runs["encoder alone"] = partitioned(
      known["ours, full depth"][0], None, batch, partitioner, encode_only
    )
    medians = {name: 1000 * x for name, x in interleaved(runs, repeats).items()}
    row: dict[str, Any] = {"data x model": mesh, "rows": per_device * grid.size}
    for name, run in runs.items():
      row[name] = f"{medians[name]:.0f} ({medians['ours, full depth'] / medians[name]:.2f}x)"
      layers = np.asarray(dict(jax.device_get(run())[1]).get("exit_layers", 0))
      if layers[layers > 0].size > 0 and f"at {THRESHOLD}" in name:
        row[name] += f", {layers[layers > 0].mean():.1f} layers"
    found.append(row)
  return found


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
  """Median seconds of calls that take turns."""
  times: dict[str, list[float]] = {}
  for _ in range(repeats):
    for name, call in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times.setdefault(name, []).append(time.perf_counter() - start)
  return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_meshes(meshes: list[str], repeats: int) -> None:
  """A process for each mesh (the number of devices is fixed when JAX starts), and the file."""
  rows = []
  for mesh in meshes:
    count = int(np.prod([int(n) for n in mesh.split("x")]))
    flags = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-W", "ignore", __file__, "--mesh", mesh]
    done = subprocess.run(
      [*command, "--repeats", str(repeats)],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    rows += json.loads(done.stdout.splitlines()[-1])
    for row in json.loads(done.stdout.splitlines()[-1]):
      print(*row.values(), sep=" | ", flush=True)
  names = ("jax", "jaxlib", "flax", "numpy", "seqio")
  table = {
    "command": f"python scripts/benchmark_t5x.py --devices {' '.join(meshes)}"
    f" --repeats {repeats}",
    "columns": list(rows[0]),
    "rows": rows,
    "versions": {name: importlib.metadata.version(name) for name in names}
    | {"python": sys.version.split()[0], "t5x": "cc342d4"},
    "machine": f"{os.cpu_count()} CPU cores, shared; ms a batch with its encoder (full depth"
    " over it)",
  }
  RESULTS.parent.mkdir(exist_ok=True)
  RESULTS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
  parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--input_length", type=int, default=128)
  parser.add_argument("--steps", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--devices", nargs="+", help="meshes, data x model: 4x1 8x1 2x2")
  parser.add_argument("--mesh", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.mesh:
    print(json.dumps(measure_mesh(arguments.mesh, arguments.repeats)))
    return
  if arguments.devices:
    measure_meshes(arguments.devices, arguments.repeats)
    return
  for size in arguments.batch_sizes:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCABULARY - 200, (size, arguments.input_length))
    decoder = jnp.zeros((size, arguments.steps), jnp.int32)
    batch = {"encoder_input_tokens": jnp.asarray(tokens), "decoder_input_tokens": decoder}
    medians = interleaved(runners(arguments.shape, batch), arguments.repeats)
    base = medians["T5X's network, T5X's loop"]
    for name, median in medians.items():
      step = 1000 * median / arguments.steps
      print(f"{arguments.shape} B={size} {name}: {step:.2f} ms a step, {base / median:.2f}x")


if __name__ == "__main__":
  main()
