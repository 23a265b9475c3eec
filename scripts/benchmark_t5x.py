"""Our model against T5X's own network in T5X's own loop, side by side.

  python scripts/benchmark_t5x.py --batch_sizes 1 8 --repeats 5
  python scripts/benchmark_t5x.py --devices 4x1 8x1 2x2 --repeats 9 --data data

Random weights of a T5 1.1 shape, float32, greedy, every step of the length run,
to scripts/results/t5x_full_depth.json. With `--devices` (data x model): the
model in the box and real prompts in T5X's partitioned step on virtual CPU
devices, a process for each mesh and kind of text, to
scripts/results/t5x_mesh.json. Our decoder's weights stay whole on every device.
Medians of repeats that take turns, in one process. Needs T5X.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tables
from flax import core as flax_core
from t5x import adafactor, decoding, partitioning, utils  # pyright: ignore[reportMissingImports]
from t5x import models as t5x_models  # pyright: ignore[reportMissingImports]
from t5x.examples.t5 import network as t5x_network  # pyright: ignore[reportMissingImports]

from calm import checkpoints, exits, inference
from calm.data import prompt_files
from calm.exits import confidence
from calm.t5 import network
from calm.t5x import models

PER_DEVICE = (1, 2)  # rows
LAYERS = (2, 4)
SOFTMAX = f"ours, softmax after {' and '.join(map(str, LAYERS))}, as certified"
ENCODER = "encoder alone"


# Task of the model in the box -> prompts under the folder of the data sets
# (None: those in the box), prefix, tokens read and written, and a threshold of
# the softmax measure after `LAYERS`, about what is certified for delta = 0.1.
ENFR = "debian_enfr/validation.jsonl.gz"
TEXTS: dict[str, tuple[str | None, str, int, int, float]] = {
  "synopses": (None, "summarize: ", 192, 24, 0.2),
  "translations": (ENFR, "translate English to French: ", 96, 96, 0.28),
}
T5X = "cc342d4"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "seqio")
INPUTS = "encoder_input_tokens"
# T5 1.1 small, prompts of 128 tokens, 64 steps.
SIZES: dict[str, Any] = {
  **{
    "vocab_size": 32128,
    "emb_dim": 512,
    "num_heads": 6,
    "head_dim": 64,
    "mlp_dim": 1024,
  },
  **{
    "num_encoder_layers": 8,
    "num_decoder_layers": 8,
    "mlp_activations": ("gelu", "linear"),
  },
}
INPUT_LENGTH = 128
STEPS = 64
NO_EOS = 2**30  # an id that is never emitted: every step runs
THEIRS = "T5X's network, T5X's loop"
GREEDILY = functools.partial(
  decoding.temperature_sample, temperature=0.0, topk=0
)


def parts_of(**sizes: Any) -> tuple[Any, ...]:
  """What a model of T5X's is made of: T5X's network, vocabularies, an
  optimizer.
  """
  words = seqio.PassThroughVocabulary(sizes["vocab_size"], 1)
  module = t5x_network.Transformer(
    t5x_network.T5Config(dtype=jnp.float32, **sizes)
  )
  return module, words, words, adafactor.Adafactor(learning_rate=1e-3)


def without_exits(params: Any) -> Any:
  decoder = {
    k: v for k, v in params["decoder"].items() if not k.startswith("exit_")
  }
  return {**params, "decoder": decoder}


def runners(batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
  """Name -> one timed call."""
  parts = parts_of(**SIZES, dropout_rate=0.0)
  kinds: dict[str, Any] = {
    THEIRS: t5x_models.EncoderDecoderModel(*parts, GREEDILY),
    "our model, T5X's loop": models.EncoderDecoderModel(*parts, GREEDILY),
    "our model, greedy_decode": models.EncoderDecoderModel(
      *parts, models.greedy_decode
    ),
  }
  shapes = {name: array.shape for name, array in batch.items()}
  params = kinds["our model, T5X's loop"].get_initial_variables(
    jax.random.key(0), shapes
  )
  params = without_exits(jax.tree.map(jnp.asarray, dict(params["params"])))
  options = {"eos_id": NO_EOS}

  def step(model):
    return jax.jit(functools.partial(predict, model, options=options))

  return {
    name: functools.partial(step(model), params, batch)
    for name, model in kinds.items()
  }


def packed_batch(
  rows: int, kind: str, data: pathlib.Path
) -> dict[str, np.ndarray]:
  """The first prompts of a task, as T5X's feature converter has them."""
  task, prefix, input_length, length, _ = TEXTS[kind]
  words: Any = checkpoints.load(inference.PACKED).vocabulary
  path = data / task if task else inference.PACKED / "prompts_calibration.jsonl"
  prompts = itertools.islice(prompt_files.open_prompts(path), rows)
  tokens = np.zeros((rows, input_length), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    ids = [*words.encode(prefix + prompt.input)[: len(row) - 1], 1]
    row[: len(ids)] = ids
  return {
    INPUTS: tokens,
    "decoder_input_tokens": np.zeros((rows, length), np.int32),
  }


def packed_models(kind: str) -> dict[str, tuple[Any, float | None]]:
  """Name -> (model, threshold), for one kind of texts."""
  config = checkpoints.load(inference.PACKED).config
  fields = t5x_network.T5Config.__dataclass_fields__
  parts = parts_of(
    **{name: getattr(config, name) for name in fields if name != "dtype"}
  )

  def ours(measure, *layers):
    return models.EncoderDecoderModel(
      *parts,
      models.greedy_decode,
      rule=exits.DynamicExits(measure, allowed=layers or None),
      whole_decoder=True,
    )

  softmax = ours(confidence.Softmax(), *LAYERS)
  return {
    THEIRS: (t5x_models.EncoderDecoderModel(*parts, GREEDILY), None),
    "ours, full depth": (softmax, None),
    SOFTMAX: (softmax, TEXTS[kind][-1]),
    # Every token leaves after its first layer: as fast as exits can be.
    "ours, classifier, at once": (ours(confidence.Classifier()), 0.0),
  }


def encode_only(model: Any, params: Any, batch: Any, options: Any) -> Any:
  """What every system does first."""
  return network.encode(params, model.config, batch[INPUTS]), {}


def predict(model: Any, params: Any, batch: Any, options: Any) -> Any:
  return model.predict_batch_with_aux(
    params, batch, decoder_params=dict(options)
  )


def partitioned(
  model: Any,
  threshold: float | None,
  batch: Any,
  partitioner: Any,
  function: Any = predict,
) -> Any:
  """T5X's partitioned prediction of a batch by the model in the box."""
  shapes = {name: x.shape for name, x in batch.items()}
  shapes["decoder_target_tokens"] = shapes["decoder_input_tokens"]
  init = model.get_initial_variables
  axes = utils.TrainStateInitializer(
    None, init, shapes, partitioner
  ).train_state_axes.params
  params = checkpoints.load(inference.PACKED).params
  if "exit_classifier" not in axes["decoder"]:  # nor the probes
    params = without_exits(params)
  place = partitioner.partition(
    lambda p: p, in_axis_resources=(None,), out_axis_resources=axes
  )
  options = {} if threshold is None else {"threshold": jnp.float32(threshold)}
  step = partitioner.partition(
    functools.partial(function, model, options=options),
    in_axis_resources=(axes, partitioner.data_partition_spec),
    out_axis_resources=None,
  )
  run = functools.partial(step, place(flax_core.freeze(params)), batch)
  jax.block_until_ready(run())
  return run


def measure_mesh(mesh: str, kind: str, flags: argparse.Namespace) -> list[dict]:
  """Rows of the table for one mesh, whose devices this process has."""
  along, model_axis = map(int, mesh.split("x"))
  grid = np.array(jax.devices()).reshape(along, model_axis)
  # On a CPU T5X puts every device on its model axis, whatever num_partitions
  # says.
  partitioning.get_cpu_mesh = lambda: jax.sharding.Mesh(grid, ["data", "model"])
  partitioner = partitioning.PjitPartitioner(num_partitions=model_axis)
  found = []
  for per_device in PER_DEVICE:
    batch = packed_batch(per_device * grid.size, kind, flags.data)
    known = packed_models(kind)
    runs = {
      name: partitioned(*x, batch, partitioner) for name, x in known.items()
    }
    full = known["ours, full depth"][0]
    runs[ENCODER] = partitioned(full, None, batch, partitioner, encode_only)
    medians = {
      name: 1000 * timed.median
      for name, timed in harness.in_turn(runs, flags.repeats).items()
    }
    row: dict[str, Any] = {
      "texts": kind,
      "data x model": mesh,
      "rows": len(batch[INPUTS]),
    }
    for name, run in runs.items():
      layers = np.asarray(dict(jax.device_get(run())[1]).get("exit_layers", 0))
      row[name] = told(name, medians, layers[layers > 0])
    found.append(row)
  return found


def told(name: str, medians: dict[str, float], layers: np.ndarray) -> str:
  """A cell: milliseconds, full depth over them, the same without the encoder,
  layers.
  """
  full = medians["ours, full depth"]
  encoder = medians[ENCODER]
  here = medians[name]
  if name in (ENCODER, "ours, full depth"):
    return f"{here:.0f}"
  apart = (full - encoder) / max(here - encoder, 1e-9)
  cell = f"{here:.0f} (x{full / here:.2f}; x{apart:.2f})"
  return cell + (f", {layers.mean():.1f} layers" if len(layers) else "")


def measure_meshes(flags: argparse.Namespace, path: pathlib.Path) -> None:
  """A process for each mesh (the number of devices is fixed when JAX starts),
  and the file.
  """
  rows: list[dict[str, Any]] = []
  for kind, mesh in itertools.product(TEXTS, flags.devices):
    count = int(np.prod([int(n) for n in mesh.split("x")]))
    devices = f"--xla_force_host_platform_device_count={count}"
    command = [
      sys.executable,
      "-W",
      "ignore",
      __file__,
      "--mesh",
      mesh,
      "--texts",
      kind,
    ]
    command += ["--data", str(flags.data), "--repeats", str(flags.repeats)]
    env = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
      command, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    made = json.loads(done.stdout.splitlines()[-1])
    for row in made:
      print(*row.values(), sep=" | ", flush=True)
    rows = sorted(
      [*rows, *made], key=lambda row: (row["texts"], row["data x model"])
    )
    write(path, {"columns": list(rows[0]), "rows": rows})


def write(path: pathlib.Path, table: dict[str, Any]) -> None:
  """A table as scripts/tables.py reads it; its command leaves out where it was
  written.
  """
  cores = f"{os.cpu_count()} CPU cores, shared"
  tables.write(
    path, **table, machine=cores, packages=PACKAGES, versions={"t5x": T5X}
  )


def measure_loops(flags: argparse.Namespace) -> dict[str, Any]:
  """The table of random weights on one device: systems by rows, batch sizes by
  columns.
  """
  rows: dict[str, list[str]] = {}
  for size in flags.batch_sizes:
    tokens = np.random.default_rng(0).integers(3, 31928, (size, INPUT_LENGTH))
    decoder = jnp.zeros((size, STEPS), jnp.int32)
    batch = {INPUTS: jnp.asarray(tokens), "decoder_input_tokens": decoder}
    runs = harness.in_turn(runners(batch), flags.repeats)
    for name, timed in runs.items():
      cell = (
        f"{1000 * timed.median / STEPS:.2f} "
        f"(x{runs[THEIRS].median / timed.median:.2f})"
      )
      rows.setdefault(name, [name]).append(cell)
      print(f"B={size} {name}: {cell}", flush=True)
  sizes = [f"small, B={size}, ms a step" for size in flags.batch_sizes]
  return {"columns": ["", *sizes], "rows": list(rows.values())}


def main() -> None:
  shape = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
  add = parser.add_argument
  add("--batch_sizes", type=int, nargs="+", default=[1, 8])
  add("--repeats", type=int, default=5)
  add("--devices", nargs="+", help="meshes, data x model: 4x1 8x1 2x2")
  add(
    "--data", type=pathlib.Path, default="data", help="folder of the data sets"
  )
  add("--output", type=pathlib.Path, help="default: in scripts/results")
  add("--mesh", help=argparse.SUPPRESS)
  add("--texts", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.mesh:
    print(json.dumps(measure_mesh(flags.mesh, flags.texts, flags)))
  elif flags.devices:
    measure_meshes(flags, flags.output or tables.RESULTS / "t5x_mesh.json")
  else:
    write(
      flags.output or tables.RESULTS / "t5x_full_depth.json",
      measure_loops(flags),
    )


if __name__ == "__main__":
  main()
