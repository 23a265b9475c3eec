"""Our model against T5X's own network in T5X's own loop, side by side.

  python scripts/benchmark_t5x.py --batch_sizes 1 8 --repeats 5
  python scripts/benchmark_t5x.py --devices 4x1 8x1 2x2 --repeats 9 --data data

Random weights of a T5 1.1 shape, float32, greedy, every step of the length run, to
scripts/results/t5x_full_depth.json. With `--devices` (data x model): the model in the box and
real prompts in T5X's partitioned step on virtual CPU devices, a process for each mesh and kind
of text, to scripts/results/t5x_mesh.json. Our decoder's weights stay whole on every device.
Medians of repeats that take turns, in one process. Needs T5X.
"""

import argparse
import dataclasses
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

RESULTS = pathlib.Path(__file__).parent / "results"
PER_DEVICE = (1, 2)  # rows
# Every token leaves after its first layer there: as fast as exits can be.
AT_ONCE = 0.0
LAYERS = (2, 4)
SOFTMAX = f"ours, softmax after {' and '.join(map(str, LAYERS))}, as certified"
ENCODER = "encoder alone"


@dataclasses.dataclass(frozen=True)
class Texts:
  """A task of the model in the box.

  Attributes:
    path: its prompts, under the folder of the data sets; None: those in the box.
    prefix: before every prompt.
    input_length: tokens that are read.
    length: most tokens that are written.
    threshold: of the softmax measure after `LAYERS`; about what is certified for delta = 0.1.
  """

  path: str | None
  prefix: str
  input_length: int
  length: int
  threshold: float


TEXTS = {
  "synopses": Texts(None, "summarize: ", 192, 24, 0.2),
  "translations": Texts(
    "debian_enfr/validation.jsonl.gz", "translate English to French: ", 96, 96, 0.28
  ),
}
SHAPES = {
  "tiny": dict(emb_dim=128, num_heads=4, head_dim=32, mlp_dim=256, num_layers=4),
  "small": dict(emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024, num_layers=8),
}
T5X = "cc342d4"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "seqio")
INPUTS = "encoder_input_tokens"
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


def systems(shape: str) -> dict[str, Any]:
  """Name -> model."""
  words = seqio.PassThroughVocabulary(VOCABULARY, 1)
  sample = functools.partial(decoding.temperature_sample, temperature=0.0, topk=0)
  arguments = (module_of(shape), words, words, adafactor.Adafactor(learning_rate=1e-3))
  return {
    "T5X's network, T5X's loop": t5x_models.EncoderDecoderModel(*arguments, sample),
    "our model, T5X's loop": models.EncoderDecoderModel(*arguments, sample),
    "our model, greedy_decode": models.EncoderDecoderModel(*arguments, models.greedy_decode),
  }


def runners(shape: str, batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
  """Name -> one timed call,"""
  kinds = systems(shape)
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
  return made


def packed_batch(rows: int, kind: str, data: pathlib.Path) -> dict[str, np.ndarray]:
  """The first prompts of a task, as T5X's feature converter has them."""
  task = TEXTS[kind]
  words: Any = checkpoints.load(inference.PACKED).vocabulary
  path = inference.PACKED / "prompts_calibration.jsonl" if not task.path else data / task.path
  prompts = itertools.islice(prompt_files.open_prompts(path), rows)
  tokens = np.zeros((rows, task.input_length), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    ids = [*words.encode(task.prefix + prompt.input)[: len(row) - 1], 1]
    row[: len(ids)] = ids
  decoder = np.zeros((rows, task.length), np.int32)
  return {INPUTS: tokens, "decoder_input_tokens": decoder}


def packed_models(kind: str) -> dict[str, tuple[Any, float | None]]:
  """Name -> (model, threshold), for one kind of texts."""
  config = checkpoints.load(inference.PACKED).config
  fields = t5x_network.T5Config.__dataclass_fields__
  given = {name: getattr(config, name) for name in fields if name != "dtype"}
  module = t5x_network.Transformer(t5x_network.T5Config(dtype=jnp.float32, **given))
  words = seqio.PassThroughVocabulary(config.vocab_size, 1)
  arguments = (module, words, words, adafactor.Adafactor(learning_rate=1e-3))
  sample = functools.partial(decoding.temperature_sample, temperature=0.0, topk=0)
  ours = lambda measure, *layers: models.EncoderDecoderModel(
    *arguments,
    models.greedy_decode,
    rule=exits.DynamicExits(measure, allowed=layers or None),
    whole_decoder=True,
  )
  softmax = ours(confidence.Softmax(), *LAYERS)
  return {
    "T5X's network, T5X's loop": (t5x_models.EncoderDecoderModel(*arguments, sample), None),
    "ours, full depth": (softmax, None),
    SOFTMAX: (softmax, TEXTS[kind].threshold),
    "ours, classifier, at once": (ours(confidence.Classifier()), AT_ONCE),
  }


def encode_only(model: Any, params: Any, batch: Any, options: Any) -> Any:
  """What every system does first."""
  return network.encode(params, model.config, batch[INPUTS]), {}


def predict(model: Any, params: Any, batch: Any, options: Any) -> Any:
  return model.predict_batch_with_aux(params, batch, decoder_params=dict(options))


def partitioned(
  model: Any, threshold: float | None, batch: Any, partitioner: Any, function: Any = predict
) -> Any:
  """T5X's partitioned prediction of a batch by the model in the box."""
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


def measure_mesh(mesh: str, kind: str, flags: argparse.Namespace) -> list[dict]:
  """Rows of the table for one mesh, whose devices this process has."""
  along, model_axis = map(int, mesh.split("x"))
  grid = np.array(jax.devices()).reshape(along, model_axis)
  # On a CPU T5X puts every device on its model axis, whatever num_partitions says.
  partitioning.get_cpu_mesh = lambda: jax.sharding.Mesh(grid, ["data", "model"])
  partitioner = partitioning.PjitPartitioner(num_partitions=model_axis)
  found = []
  for per_device in PER_DEVICE:
    batch = packed_batch(per_device * grid.size, kind, flags.data)
    known = packed_models(kind)
    runs = {name: partitioned(*x, batch, partitioner) for name, x in known.items()}
    full = known["ours, full depth"][0]
    runs[ENCODER] = partitioned(full, None, batch, partitioner, encode_only)
    medians = {
      name: 1000 * timed.median for name, timed in harness.in_turn(runs, flags.repeats).items()
    }
    row: dict[str, Any] = {"texts": kind, "data x model": mesh, "rows": len(batch[INPUTS])}
    for name, run in runs.items():
      layers = np.asarray(dict(jax.device_get(run())[1]).get("exit_layers", 0))
      row[name] = told(name, medians, layers[layers > 0])
    found.append(row)
  return found


def told(name: str, medians: dict[str, float], layers: np.ndarray) -> str:
  """A cell: milliseconds, full depth over them, the same without the encoder, layers."""
  full, encoder, here = medians["ours, full depth"], medians[ENCODER], medians[name]
  if name in (ENCODER, "ours, full depth"):
    return f"{here:.0f}"
  apart = (full - encoder) / max(here - encoder, 1e-9)
  cell = f"{here:.0f} (x{full / here:.2f}; x{apart:.2f})"
  return cell + (f", {layers.mean():.1f} layers" if len(layers) else "")


def measure_meshes(flags: argparse.Namespace, path: pathlib.Path) -> None:
  """A process for each mesh (the number of devices is fixed when JAX starts), and the file."""
  rows: list[dict[str, Any]] = []
  for kind, mesh in itertools.product(flags.texts, flags.devices):
    count = int(np.prod([int(n) for n in mesh.split("x")]))
    devices = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-W", "ignore", __file__, "--mesh", mesh, "--texts", kind]
    done = subprocess.run(
      [*command, "--data", str(flags.data), "--repeats", str(flags.repeats)],
      env=os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    made = json.loads(done.stdout.splitlines()[-1])
    for row in made:
      print(*row.values(), sep=" | ", flush=True)
    rows = sorted([*rows, *made], key=lambda row: (row["texts"], row["data x model"]))
    write(path, {"columns": list(rows[0]), "rows": rows})


def write(path: pathlib.Path, table: dict[str, Any]) -> None:
  """A table as scripts/tables.py reads it; its command leaves out where it was written."""
  cores = f"{os.cpu_count()} CPU cores, shared"
  tables.write(path, **table, machine=cores, packages=PACKAGES, versions={"t5x": T5X})


def measure_loops(flags: argparse.Namespace) -> dict[str, Any]:
  """The table of random weights on one device: systems by rows, batch sizes by columns."""
  rows: dict[str, list[str]] = {}
  for size in flags.batch_sizes:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCABULARY - 200, (size, flags.input_length))
    decoder = jnp.zeros((size, flags.steps), jnp.int32)
    batch = {INPUTS: jnp.asarray(tokens), "decoder_input_tokens": decoder}
    runs = harness.in_turn(runners(flags.shape, batch), flags.repeats)
    medians = {name: timed.median for name, timed in runs.items()}
    base = medians["T5X's network, T5X's loop"]
    for name, median in medians.items():
      cell = f"{1000 * median / flags.steps:.2f} (x{base / median:.2f})"
      rows.setdefault(name, [name]).append(cell)
      print(f"{flags.shape} B={size} {name}: {cell}", flush=True)
  sizes = [f"{flags.shape}, B={size}, ms a step" for size in flags.batch_sizes]
  return {"columns": ["", *sizes], "rows": list(rows.values())}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--shape", default="small", choices=sorted(SHAPES))
  add("--batch_sizes", type=int, nargs="+", default=[1, 8])
  add("--input_length", type=int, default=128)
  add("--steps", type=int, default=64)
  add("--repeats", type=int, default=5)
  add("--devices", nargs="+", help="meshes, data x model: 4x1 8x1 2x2")
  add("--texts", nargs="+", default=list(TEXTS), choices=TEXTS, help="with --devices")
  add("--data", type=pathlib.Path, default="data", help="folder of the data sets")
  add("--output", type=pathlib.Path, help="default: in scripts/results")
  add("--mesh", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.mesh:
    made = measure_mesh(flags.mesh, flags.texts[0], flags)
    print(json.dumps(made))
  elif flags.devices:
    measure_meshes(flags, flags.output or RESULTS / "t5x_mesh.json")
  else:
    write(flags.output or RESULTS / "t5x_full_depth.json", measure_loops(flags))


if __name__ == "__main__":
  main()
