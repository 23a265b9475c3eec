"""A training run from its parts, as gin files give them: data, model, objective, export.

`calm train` calls `train`. Nothing here needs TensorFlow but `seqio_pairs`, which imports it
when it is called.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import checkpoints
from calm.calibrate.generations import files
from calm.data import datasets, training_batches, vocabulary
from calm.t5 import network, parameters
from calm.training import loop, objectives

MODEL_FOLDER = "model"


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run trains and validates on.

  Attributes:
    train: the source of training batches.
    validation: name -> source; the first one's scalars are called plainly `loss`,
      `accuracy/layer_8`, the others' `<name>/loss` and so on.
    num_validation_batches: batches of each validation source, the same ones every time.
  """

  train: training_batches.Source
  validation: Mapping[str, training_batches.Source] = dataclasses.field(default_factory=dict)
  num_validation_batches: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Export:
  """What is written beside the trained parameters, so that inference needs no options.

  Attributes:
    vocabulary: stored in the checkpoint.
    task_prefix: text put before every prompt.
    max_input_length: tokens of a prompt that are read, EOS included.
    max_decode_length: most tokens generated, EOS included.
    storage_dtype: 'float32', or 'bfloat16' for half the size.
    shortlist: token ids for the measure 'shortlist', most likely first (`frequent_tokens`).
  """

  vocabulary: checkpoints.Vocabulary
  task_prefix: str = ""
  max_input_length: int = 512
  max_decode_length: int = 64
  storage_dtype: str = "float32"
  shortlist: Sequence[int] = ()

  def write(self, directory: pathlib.Path, params: Any, config: network.T5Config) -> None:
    checkpoints.save(
      directory,
      params,
      config,
      vocabulary=self.vocabulary,
      storage_dtype=self.storage_dtype,
    )
    names = ("task_prefix", "max_input_length", "max_decode_length")
    options: dict[str, Any] = {name: getattr(self, name) for name in names}
    if self.shortlist:
      options["shortlist"] = list(self.shortlist)
    files.write_atomically(directory / "inference.json", json.dumps(options, indent=1) + "\n")


def train(
  data: Data,
  objective: objectives.Objective,
  config: loop.TrainConfig,
  export: Export,
  output_dir: str,
  *,
  model: network.T5Config | None = None,
  initial: str | None = None,
  fresh: Sequence[str] = (),
  listener: loop.Listener | None = None,
) -> pathlib.Path:
  """Trains (or goes on training) and exports the parameters with the best validation.

  Args:
    data: training and validation batches.
    objective: the training stage.
    config: steps, learning rate, seed, validation and early stopping.
    export: vocabulary and decoding limits that go with the parameters.
    output_dir: checkpoints, validations, and the exported model in `model/`.
    model: sizes; None takes those of `initial`.
    initial: a checkpoint to start from (ours, Hugging Face's or T5X's), or the `output_dir`
      of an earlier run; None starts from random parameters.
    fresh: parts of the parameter tree of `initial` that start anew: ("exit_classifier",) to
      train stage two again on a checkpoint that has been through it.
    listener: told of scalars.

  Returns:
    The folder of the exported checkpoint.

  Raises:
    FileNotFoundError: there is no checkpoint at `initial`.
    ValueError: neither `model` nor `initial`, or they do not fit; a part in `fresh` that
      the tree lacks; a vocabulary larger than the model's. Errors of `training.fit` besides.
  """
  folder = pathlib.Path(output_dir)
  loop.check_writable(folder)
  model, params = starting_point(model, initial, config.seed, fresh)
  vocabulary.check_fits(export.vocabulary, model.vocab_size)
  module = network.Transformer(model)
  state = loop.fit(
    loop.init_state(params, config, objective),
    data.train,
    loop.make_train_step(module, config, objective, params),
    evaluator(module, objective, data),
    config,
    output_dir=folder,
    listener=listener,
  )
  target = folder / MODEL_FOLDER
  export.write(target, jax.tree.map(np.asarray, state.params), model)
  return target


def starting_point(
  model: network.T5Config | None,
  initial: str | None,
  seed: int,
  fresh: Sequence[str] = (),
) -> tuple[network.T5Config, Any]:
  """Sizes and parameters at step 0; exit parts that `initial` lacks are added, and the parts
  in `fresh` begin as they would without `initial`."""
  if model is not None:
    # Gin makes a subclass of what it configures: equality and hashing want the class itself.
    model = network.T5Config(**dataclasses.asdict(model))
  if initial is None:
    if model is None:
      raise ValueError(
        "Expected `model` or `initial`: sizes to start from random parameters, or a checkpoint."
        " Got neither; bind `run.train.model` or `runs.train.initial`."
      )
    return model, loop.init_params(model, seed)
  stored = checkpoints.load(find_checkpoint(initial))
  model = model or dataclasses.replace(stored.config, exit_classifier=True)
  params = parameters.add_exit_parts(stored.params, model)
  parameters.check(params, model)
  if fresh:
    # A tuple of one without its comma is a string: that one part is meant.
    parts = (fresh,) if isinstance(fresh, str) else fresh
    params = parameters.renew(params, loop.init_params(model, seed), parts)
  return model, jax.tree.map(jnp.asarray, params)


def find_checkpoint(initial: str) -> pathlib.Path:
  """The checkpoint at `initial`, or the one that a run exported below it."""
  path = pathlib.Path(initial)
  if not path.is_dir():
    raise FileNotFoundError(
      "Expected `initial` to be the folder of a checkpoint or of a finished run. Got"
      f" {initial!r}, which is {'a file' if path.exists() else 'missing'}."
    )
  exported = path / MODEL_FOLDER
  if (exported / "config.json").is_file():
    return exported
  if (path / "validation.json").is_file():
    raise FileNotFoundError(
      f"Expected `initial` to be a finished run. Got {initial!r}, which has exported no"
      f" {MODEL_FOLDER}/ yet; run its `calm train` command again, it goes on where it stopped."
    )
  return path


def evaluator(module: network.Transformer, objective: objectives.Objective, data: Data):
  """Parameters -> the validation scalars of every source of `data`."""
  functions = {}
  for name, source in data.validation.items():
    rows = [source.batch(step) for step in range(data.num_validation_batches.get(name, 8))]
    functions[name] = loop.make_eval_fn(module, objective, rows)

  def evaluate(params):
    scalars = {}
    for number, (name, function) in enumerate(functions.items()):
      prefix = f"{name}/" if number else ""
      scalars |= {prefix + key: value for key, value in function(params).items()}
    return scalars

  return evaluate


def supervised(
  path: str,
  vocabulary: checkpoints.Vocabulary,
  buckets: Sequence[tuple[int, int]],
  batch_size: int,
  *,
  root: str = "",
  prefix: str = "",
  seed: int = 0,
  every: int = 1,
) -> training_batches.Supervised:
  """Length-bucketed batches of one JSON Lines file (see `datasets`).

  Args:
    path: the file, below `root`.
    vocabulary: text -> ids.
    buckets: (input_length, target_length) in tokens with EOS, ascending.
    batch_size: rows of a batch.
    prefix: put before each input.
    seed: seeds the order.
    every: keep every n-th example only.
  """
  examples = datasets.read_examples(pathlib.Path(root) / path)[::every]
  eos_id = vocabulary.eos_id
  encode = vocabulary.encode
  return training_batches.Supervised(
    training_batches.encode_all([prefix + e.input for e in examples], encode, eos_id),
    training_batches.encode_all([e.targets[0] for e in examples], encode, eos_id),
    tuple(training_batches.Bucket(*bucket) for bucket in buckets),
    batch_size,
    seed,
  )


def frequent_tokens(
  paths: Sequence[str], vocabulary: checkpoints.Vocabulary, size: int, *, root: str = ""
) -> tuple[int, ...]:
  """A shortlist from training targets: the `size` tokens seen most often, EOS included.

  Args:
    paths: JSON Lines files, below `root`; the first target of each example is read. Each file
      weighs the same, however long its texts.
    vocabulary: text -> ids.
    size: most tokens on the list.
  """
  shares: collections.Counter[int] = collections.Counter()
  for path in paths:
    examples = datasets.read_examples(pathlib.Path(root) / path)
    counts = collections.Counter(vocabulary.eos_id for _ in examples)
    for example in examples:
      counts.update(vocabulary.encode(example.targets[0]))
    total = counts.total()
    for token, count in counts.items():
      shares[token] += count / total  # pyright: ignore[reportArgumentType]
  # Ties by id, so that the same files give the same list.
  return tuple(sorted(shares, key=lambda token: (-shares[token], token))[:size])


def denoising(
  texts: Sequence[tuple[str, str]],
  vocabulary: checkpoints.Vocabulary,
  length: int,
  batch_size: int,
  *,
  root: str = "",
  seed: int = 0,
  min_tokens: int = 16,
) -> training_batches.Denoising:
  """T5 span corruption over the inputs of JSON Lines files, each distinct text once.

  Args:
    texts: (file below `root`, marker): of each input, what follows the first marker; the
      whole input where the marker is "".
    vocabulary: text -> ids; its extra ids are the sentinels.
    length: tokens of a text that are read, before corruption.
    batch_size: rows of a batch.
    seed: seeds order and corruption.
    min_tokens: shorter texts are left out.
  """
  found: dict[str, None] = {}
  for path, marker in texts:
    for example in datasets.read_examples(pathlib.Path(root) / path, require_target=False):
      found[example.input.split(marker, 1)[-1] if marker else example.input] = None
  encoded = [tokens for tokens in map(vocabulary.encode, found) if len(tokens) >= min_tokens]
  source = training_batches.Denoising(
    training_batches.Ragged(encoded),
    length,
    batch_size,
    seed,
    first_sentinel=vocabulary.vocab_size - 1,
    eos_id=vocabulary.eos_id,
  )
  if source.max_spans > vocabulary.extra_ids:
    raise ValueError(
      f"Expected a vocabulary with at least {source.max_spans} `extra_ids`, one a corrupted"
      f" span of a text of {length} tokens. Got {vocabulary.extra_ids}; shorten `length`."
    )
  return source


def seqio_pairs(
  mixture_or_task_name: str,
  buckets: Sequence[tuple[int, int]],
  batch_size: int,
  *,
  split: str = "train",
  seed: int = 0,
  num_examples: int | None = None,
) -> training_batches.Supervised:
  """Length-bucketed batches of a registered seqio task or mixture, read whole once.

  Args:
    mixture_or_task_name: as `calm.data.seqio_tasks` and other modules register them.
    buckets: (input_length, target_length) in tokens with EOS, ascending.
    batch_size: rows of a batch.
    split: of the task.
    seed: seeds the order, and a mixture's draws.
    num_examples: how many to read; needed for a mixture, which has no end.

  Raises:
    ValueError: a mixture without `num_examples`.
  """
  import seqio  # Brings TensorFlow: only those who train from seqio wait for it.

  source = seqio.get_mixture_or_task(mixture_or_task_name)
  is_mixture = isinstance(source, seqio.Mixture)
  if is_mixture and num_examples is None:
    raise ValueError(
      f"Expected `num_examples` for the mixture {mixture_or_task_name!r}, which repeats its"
      " tasks without end. Got None; bind `run.seqio_pairs.num_examples`."
    )
  inputs_length, targets_length = buckets[-1]
  dataset = source.get_dataset(
    sequence_length={"inputs": inputs_length, "targets": targets_length},
    split=split,
    shuffle=is_mixture,
    seed=seed,
    num_epochs=None if is_mixture else 1,
  )
  rows = list(dataset.take(-1 if num_examples is None else num_examples).as_numpy_iterator())
  return training_batches.Supervised(
    training_batches.Ragged(row["inputs"] for row in rows),
    training_batches.Ragged(row["targets"] for row in rows),
    tuple(training_batches.Bucket(*bucket) for bucket in buckets),
    batch_size,
    seed,
  )
