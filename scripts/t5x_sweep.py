"""Decode a task at full depth and at every threshold of a grid, in T5X, with one compilation.

The folder it writes is what `calm calibrate` reads: a manifest with the procedure, one file a
threshold, checksums. A run that was stopped goes on where it was. Needs T5X.

  python scripts/t5x_sweep.py --gin_search_paths=. \
      --gin_file=configs/runs/local_debian_sweep.gin \
      --gin_file=configs/tasks/debian_synopsis.gin --gin.DATA="'data'" \
      --gin.CHECKPOINT_PATH="'runs/two/checkpoint_400'" --gin.OUTPUT_DIR="'runs/cache'"
"""

import inspect
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import flags
from flax import core as flax_core
from t5x import gin_utils, partitioning, utils  # pyright: ignore[reportMissingImports]

from calm import exits, inference
from calm.calibrate import Procedure, Prompt, Provenance, Record, default_grid, open_writer
from calm.data import vocabulary as vocabularies
from calm.exits import schedules
from calm.t5x import models


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
  """Decodes the whole grid.

  Args:
    model: decodes greedily (`models.greedy_decode`) by an `exits.DynamicExits` rule.
    dataset_cfg: T5X's; its task keeps `id`.
    partitioner: T5X's.
    restore_checkpoint_cfg: T5X's.
    output_dir: folder to write.
    thresholds: descending; None is the measure's own grid.
    task_prefix: what the task puts before every input; recorded, and taken off the inputs.
    limit: decode the first so many examples only.
  """
  params, step = load(model, dataset_cfg, partitioner, restore_checkpoint_cfg)
  examples = list(itertools.islice(read(dataset_cfg, model), limit))
  prompts = [prompt_of(example, task_prefix) for example, _ in examples]
  procedure = procedure_of(model, params, dataset_cfg, task_prefix)
  levels = list(default_grid(procedure.measure) if thresholds is None else thresholds)
  writer = open_writer(
    output_dir,
    prompts=prompts,
    thresholds=levels,
    procedure=procedure,
    provenance=Provenance(
      grid=tuple(levels),
      num_examples=len(prompts),
      notes={"checkpoint": str(restore_checkpoint_cfg.path)},
    ),
  )
  size = dataset_cfg.batch_size
  for start in range(0, len(examples), size):
    rows = examples[start : start + size]
    ids = [prompt.id for prompt in prompts[start : start + size]]
    batch = batch_of([features for _, features in rows], size)
    for threshold in (schedules.NEVER_EXIT, *levels):
      missing = set(ids) - writer.completed_ids(threshold)
      if missing:
        tokens, aux = jax.device_get(step(params, batch, np.float32(threshold)))
        records = [record_of(model, tokens, aux, row, name) for row, name in enumerate(ids)]
        writer.append(threshold, [record for record in records if record.id in missing])
    print(f"{min(start + size, len(examples))} of {len(examples)} prompts", flush=True)
  writer.finish()
  print(f"Written to {output_dir}; next: calm calibrate {output_dir}")


def load(model, dataset_cfg, partitioner, restore_checkpoint_cfg) -> tuple[Any, Any]:
  """Parameters, and the one partitioned step of (parameters, batch, threshold)."""
  size, lengths = dataset_cfg.batch_size, dataset_cfg.task_feature_lengths
  shapes = {"encoder_input_tokens": (size, lengths["inputs"])}
  for name in ("decoder_input_tokens", "decoder_target_tokens"):
    shapes[name] = (size, lengths["targets"])
  initializer = utils.TrainStateInitializer(
    optimizer_def=None,
    init_fn=model.get_initial_variables,
    input_shapes=shapes,
    partitioner=partitioner,
  )
  restore_checkpoint_cfg.strict = False  # no optimizer is restored
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer, partitioner, restore_checkpoint_cfg, restore_checkpoint_cfg.path, None,
    use_orbax=True,
  )  # fmt: skip
  if state is None:
    raise FileNotFoundError(
      f"Expected a T5X checkpoint. Got {restore_checkpoint_cfg.path!r}, which holds none."
    )

  def predict(params, batch, threshold):
    return model.predict_batch_with_aux(params, batch, decoder_params={"threshold": threshold})

  step = partitioner.partition(
    predict,
    in_axis_resources=(
      initializer.train_state_axes.params, partitioner.data_partition_spec, None,
    ),
    out_axis_resources=None,
  )  # fmt: skip
  return state.params, step


def read(dataset_cfg, model) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
  """Pairs of a task's example and the model's features of it, in the order of the split."""
  task = seqio.get_mixture_or_task(dataset_cfg.mixture_or_task_name)
  examples = task.get_dataset(
    sequence_length=dataset_cfg.task_feature_lengths,
    split=dataset_cfg.split,
    shuffle=False,
    num_epochs=1,
    use_cached=dataset_cfg.use_cached,
    seed=dataset_cfg.seed,
  )
  features = model.FEATURE_CONVERTER_CLS(pack=False)(examples, dataset_cfg.task_feature_lengths)
  return zip(examples.as_numpy_iterator(), features.as_numpy_iterator(), strict=True)


def batch_of(features: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
  """Features stacked into a batch of `size` rows, the missing ones padding."""
  stacked = {name: np.stack([row[name] for row in features]) for name in features[0]}
  missing = size - len(features)
  return {name: np.pad(x, [(0, missing), (0, 0)]) for name, x in stacked.items()}


def prompt_of(example: dict[str, Any], task_prefix: str) -> Prompt:
  """The prompt as `calm infer` would be given it."""
  text = lambda value: value.decode("utf-8")
  targets = example.get("references", [example["targets_pretokenized"]])
  return Prompt(
    id=text(example["id"]),
    input=text(example["inputs_pretokenized"]).removeprefix(task_prefix),
    targets=tuple(text(target) for target in targets),
    group=text(example["source"]) or None if "source" in example else None,
  )


def procedure_of(model, params, dataset_cfg, task_prefix: str) -> Procedure:
  """What the outputs are valid for: the very record that `calm infer` makes of this model."""
  # Gin wraps what it configures.
  greedy = inspect.unwrap(model.decode_fn) is models.greedy_decode
  if not greedy or not isinstance(model.rule, exits.DynamicExits):
    raise ValueError(
      "Expected `decode_fn` models.greedy_decode and a `rule` exits.DynamicExits. Got"
      f" {model.decode_fn} and {model.rule}; sampled outputs have no calibration here."
    )
  lengths, rule = dataset_cfg.task_feature_lengths, model.rule
  options = inference.DecodeOptions(
    measure=rule.measure.name,
    schedule=rule.schedule,
    exit_layers=rule.allowed,
    propagation=rule.propagation.name,
    shortlist=model.shortlist,
    task_prefix=task_prefix,
    max_input_length=lengths["inputs"],
    max_decode_length=lengths["targets"],
    batch_size=dataset_cfg.batch_size,
  )
  tree = flax_core.unfreeze(jax.device_get(params))
  return inference.Predictor(model.config, tree, our_vocabulary(model), options).procedure


def our_vocabulary(model) -> vocabularies.SentencePieceVocabulary:
  """The model's seqio vocabulary as ours, for its digest; the file may be a bucket's."""
  words = model.output_vocabulary
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "vocabulary.model"
    path.write_bytes(tf.io.gfile.GFile(words._sentencepiece_model_file, "rb").read())
    return vocabularies.SentencePieceVocabulary(path, extra_ids=words.extra_ids)


def record_of(model, tokens, aux: dict[str, np.ndarray], row: int, name: str) -> Record:
  """One row as a record on disk, without padding."""
  length = int(np.sum(aux["exit_layers"][row] > 0))
  cut = lambda field: tuple(aux[field][row][:length].tolist())
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
  configured: Any = gin.configurable(sweep)  # pyright: ignore[reportCallIssue]
  gin_utils.parse_gin_flags(
    [*flags.FLAGS.gin_search_paths, str(pathlib.Path(partitioning.__file__).parents[1])],
    flags.FLAGS.gin_file,
    flags.FLAGS.gin_bindings,
  )
  configured()


if __name__ == "__main__":
  flags.DEFINE_multi_string("gin_file", None, "gin files, later ones win")
  flags.DEFINE_multi_string("gin_bindings", [], "single bindings; also as --gin.NAME=VALUE")
  flags.DEFINE_list("gin_search_paths", ["."], "folders that gin files are looked for in")
  gin_utils.run(main)
