"""Decode a task at full depth and at every threshold of a grid, in T5X, with
one compilation.

The folder it writes is what `calm calibrate` reads: a manifest with the
procedure, one file a threshold, checksums. A run that was stopped goes on where
it was. Any seqio task or mixture of text; examples without `id` are numbered by
line, those of a mixture are named by task. Needs T5X.

  python scripts/t5x_sweep.py --gin_search_paths=. \
      --gin_file=configs/runs/t5x_stored_model.gin
      --gin_file=configs/runs/sweep.gin \
      --gin_file=configs/tasks/debian_synopsis.gin --gin.DATA="'data'" \
      --gin.CHECKPOINT_PATH="'runs/two/checkpoint_400'"
      --gin.OUTPUT_DIR="'runs/cache'"

On several hosts start it once a host; with --coordinator_address,
--process_count and --process_index where JAX does not find its peers by itself.
The first process writes.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax
import numpy as np
import seqio
from absl import flags
from flax import core as flax_core
from jax.experimental import multihost_utils
from t5x import gin_utils, partitioning, utils  # pyright: ignore[reportMissingImports]

from calm.calibrate import (
  Procedure,
  Prompt,
  Provenance,
  Record,
  default_grid,
  open_writer,
)
from calm.exits import schedules
from calm.t5x import models, stored
from calm.training import run


def sweep(
  model: models.EncoderDecoderModel,
  dataset_cfg: Any,
  partitioner: Any,
  restore_checkpoint_cfg: Any,
  output_dir: str,
  thresholds: Sequence[float] | None = None,
  task_prefix: str = "",
  limit: int | None = None,
) -> None:
  """Decodes the whole grid with a model that decodes greedily by an
  `exits.DynamicExits` rule.

  `thresholds` descend, None is the measure's own grid; `task_prefix` is what
  the task puts before every input, and is recorded and taken off the inputs;
  `limit` is of examples.
  """
  words = stored.our_vocabulary(model.output_vocabulary)
  params, step = load(model, dataset_cfg, partitioner, restore_checkpoint_cfg)
  examples = list(itertools.islice(read(dataset_cfg, model), limit))
  prompts = [
    prompt_of(model, example, name, task_prefix)
    for example, _, name in examples
  ]
  procedure = procedure_of(
    model, params, dataset_cfg, partitioner, words, task_prefix
  )
  levels = list(
    default_grid(procedure.measure) if thresholds is None else thresholds
  )
  writer = None
  if jax.process_index() == 0:
    notes = {"checkpoint": str(restore_checkpoint_cfg.path)}
    known = Provenance(
      grid=tuple(levels), num_examples=len(prompts), notes=notes
    )
    about: dict[str, Any] = {"procedure": procedure, "provenance": known}
    writer = open_writer(
      output_dir, prompts=prompts, thresholds=levels, **about
    )
  size = dataset_cfg.batch_size
  depths = (schedules.NEVER_EXIT, *levels)
  missing = missing_ids(writer, depths, [p.id for p in prompts], size)
  for i, start in enumerate(range(0, len(examples), size)):
    ids = [prompt.id for prompt in prompts[start : start + size]]
    batch = batch_of(
      [row for _, row, _ in examples[start : start + size]], size
    )
    for j, threshold in enumerate(depths):
      if not missing[i, j]:
        continue
      tokens, aux = step(params, batch, np.float32(threshold))
      if writer:
        wanted = set(ids) - writer.completed_ids(threshold)
        records = [
          record_of(model, tokens, aux, row, name)
          for row, name in enumerate(ids)
        ]
        writer.append(
          threshold, [record for record in records if record.id in wanted]
        )
    if writer:
      print(
        f"{min(start + size, len(examples))} of {len(examples)} prompts",
        flush=True,
      )
  if writer:
    writer.finish()
    print(f"Written to {output_dir}; next: calm calibrate {output_dir}")


def missing_ids(
  writer: Any, depths: Sequence[float], ids: Sequence[str], size: int
) -> Any:
  """Whether a batch lacks a record at a threshold, [batches, thresholds]; as
  all agree.
  """
  missing = np.zeros((-(-len(ids) // size), len(depths)), bool)
  if writer:
    done = [writer.completed_ids(threshold) for threshold in depths]
    for i, j in np.ndindex(missing.shape):
      missing[i, j] = not set(ids[i * size : (i + 1) * size]) <= done[j]
  if jax.process_count() > 1:
    missing = multihost_utils.broadcast_one_to_all(missing)
  return np.asarray(missing)


def load(
  model, dataset_cfg, partitioner, restore_checkpoint_cfg
) -> tuple[Any, Any]:
  """Parameters, and the one partitioned step of (parameters, batch,
  threshold).
  """
  size = dataset_cfg.batch_size
  lengths = dataset_cfg.task_feature_lengths
  names = {
    "encoder_input": "inputs",
    "decoder_input": "targets",
    "decoder_target": "targets",
  }
  shapes = {
    f"{name}_tokens": (size, lengths[kind]) for name, kind in names.items()
  }
  init = model.get_initial_variables
  initializer = utils.TrainStateInitializer(None, init, shapes, partitioner)
  restore_checkpoint_cfg.strict = False  # no optimizer is restored
  given = (
    initializer,
    partitioner,
    restore_checkpoint_cfg,
    restore_checkpoint_cfg.path,
    None,
  )
  state, _ = utils.create_checkpoint_manager_and_restore(*given, use_orbax=True)
  if state is None:
    raise FileNotFoundError(
      f"Expected a T5X checkpoint, a folder checkpoint_STEP, got {given[3]!r}."
    )

  def predict(params, batch, threshold):
    return model.predict_batch_with_aux(
      params, batch, decoder_params={"threshold": threshold}
    )

  axes = (
    initializer.train_state_axes.params,
    partitioner.data_partition_spec,
    None,
  )
  step = partitioner.partition(
    predict, in_axis_resources=axes, out_axis_resources=None
  )
  if jax.process_count() == 1:
    return state.params, lambda *given: jax.device_get(step(*given))
  return state.params, functools.partial(_on_all_hosts, step, partitioner, size)


def _on_all_hosts(step, partitioner, size: int, params, batch, threshold):
  """A step on global arrays, as T5X's `get_infer_fn` makes them: each host
  brings its rows.
  """
  layout = partitioner.get_data_layout(size)
  whole = jax.sharding.PartitionSpec()
  own = size // layout.num_shards
  rows = slice(layout.shard_id * own, (layout.shard_id + 1) * own)
  local = {name: x[rows] for name, x in batch.items()}, threshold
  specs = (partitioner.data_partition_spec, whole)
  given = multihost_utils.host_local_array_to_global_array(
    local, partitioner.mesh, specs
  )
  return jax.tree.map(
    lambda x: np.asarray(x.addressable_data(0)), step(params, *given)
  )


def read(
  dataset_cfg, model
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray], str]]:
  """(example, the model's features of it, its name), task after task, in the
  split's order.
  """
  mixture = seqio.get_mixture_or_task(dataset_cfg.mixture_or_task_name)
  tasks = seqio.get_subtasks(mixture)
  for task in tasks:
    lengths = dataset_cfg.task_feature_lengths
    known = ("split", "use_cached", "seed")
    given = {name: getattr(dataset_cfg, name) for name in known}
    examples = task.get_dataset(lengths, shuffle=False, num_epochs=1, **given)
    features = model.FEATURE_CONVERTER_CLS(pack=False)(examples, lengths)
    pairs = zip(
      examples.as_numpy_iterator(), features.as_numpy_iterator(), strict=True
    )
    for line, (example, feature) in enumerate(pairs):
      name = text_of(example["id"]) if "id" in example else str(line)
      yield example, feature, name if len(tasks) == 1 else f"{task.name}/{name}"


def batch_of(
  features: Sequence[dict[str, np.ndarray]], size: int
) -> dict[str, np.ndarray]:
  """Features stacked into a batch of `size` rows, the missing ones padding."""
  stacked = {
    name: np.stack([row[name] for row in features]) for name in features[0]
  }
  missing = size - len(features)
  return {
    name: np.pad(x, [(0, missing), (0, 0)]) for name, x in stacked.items()
  }


def text_of(value: Any) -> str:  # numbers (ids of TFDS) as they are written
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def prompt_of(
  model, example: dict[str, Any], name: str, task_prefix: str
) -> Prompt:
  """The prompt as `calm infer` would be given it."""

  def text(feature: str) -> str:
    kept = example.get(f"{feature}_pretokenized")
    if kept is not None:
      return text_of(kept)
    return model.output_vocabulary.decode([int(i) for i in example[feature]])

  references = example.get("references")
  targets = (
    [text("targets")] if references is None else map(text_of, references)
  )
  return Prompt(
    id=name,
    input=text("inputs").removeprefix(task_prefix),
    targets=tuple(targets),
    group=text_of(example["source"]) or None if "source" in example else None,
  )


def procedure_of(
  model, params, dataset_cfg, partitioner, words: Any, task_prefix: str
) -> Procedure:
  """What the outputs are valid for: the very record that `calm infer` makes of
  this model.
  """
  lengths = dataset_cfg.task_feature_lengths
  size = dataset_cfg.batch_size
  mesh = partitioner.mesh
  axes = model.row_axes(params, mesh, size)
  if jax.process_count() > 1:
    params = multihost_utils.process_allgather(params, tiled=True)
  return stored.procedure_of(
    model,
    flax_core.unfreeze(jax.device_get(params)),
    words,
    task_prefix=task_prefix,
    max_input_length=lengths["inputs"],
    max_decode_length=lengths["targets"],
    batch_size=size // math.prod(mesh.shape[axis] for axis in axes),
  )


def record_of(
  model, tokens, aux: dict[str, np.ndarray], row: int, name: str
) -> Record:
  """One row as a record on disk, without padding."""
  length = int(np.sum(aux["exit_layers"][row] > 0))

  def cut(field):
    return tuple(aux[field][row][:length].tolist())

  return Record(
    id=name,
    prediction=model.output_vocabulary.decode(tokens[row][:length].tolist()),
    tokens=tuple(tokens[row][:length].tolist()),
    exit_layers=cut("exit_layers"),
    confidences=cut("confidences"),
    rejected_confidences=cut("rejected_confidences"),
    score=float(aux["scores"][row]),
  )


def main(_: Sequence[str]) -> None:
  known = flags.FLAGS
  if known.coordinator_address:
    jax.distributed.initialize(
      known.coordinator_address, known.process_count, known.process_index
    )
  configured: Any = gin.configurable(sweep)  # pyright: ignore[reportCallIssue]
  t5x_root = str(pathlib.Path(partitioning.__file__).parents[1])
  folders = [*known.gin_search_paths, str(run.gin_folder()), t5x_root]
  gin_utils.parse_gin_flags(folders, known.gin_file, known.gin_bindings)
  configured()


if __name__ == "__main__":
  flags.DEFINE_multi_string("gin_file", None, "gin files, later ones win")
  flags.DEFINE_multi_string(
    "gin_bindings", [], "single bindings; also as --gin.NAME=VALUE"
  )
  flags.DEFINE_list(
    "gin_search_paths", ["."], "folders that gin files are looked for in"
  )
  flags.DEFINE_string(
    "coordinator_address", None, "of the first process: address:port"
  )
  flags.DEFINE_integer("process_count", None, "processes")
  flags.DEFINE_integer("process_index", None, "of this process, from 0")
  gin_utils.run(main)
