"""A training run from its parts, as gin files give them: data, model,
objective, export.

`calm train` calls `train`.
"""

import dataclasses
import functools
import json
import logging
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import arguments, checkpoints, storage
from calm.data import training_batches, vocabulary
from calm.t5 import limits, network, parameters
from calm.training import loop, objectives, sources, updates

_LOG = logging.getLogger(__name__)
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def gin_folder() -> pathlib.Path:
  """The folder that holds `configs/`, which `include "configs/..."` is written
  from: beside the package, or the package itself once it is installed.
  """
  return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Data:
  """What a run trains and validates on."""

  train: training_batches.Source  # of training batches
  # Name -> source; the first one's scalars are called plainly `loss`,
  # `accuracy/layer_8`, the others' `<name>/loss` and so on.
  validation: Mapping[str, training_batches.Source] = dataclasses.field(
    default_factory=dict
  )
  # Batches of each validation source, the same ones every time.
  num_validation_batches: Mapping[str, int] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    for count in self.num_validation_batches.values():
      limits.whole("num_validation_batches", count, 1, 2**31, "give batches")


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class Export:
  """What is written beside the trained parameters, so that inference needs no
  options.
  """

  vocabulary: checkpoints.Vocabulary  # stored in the checkpoint
  task_prefix: str = ""  # text put before every prompt
  max_input_length: int = 512  # tokens of a prompt that are read, EOS included
  max_decode_length: int = 64  # most tokens generated, EOS included
  # Token ids for the measure 'shortlist', most likely first
  # (`sources.frequent_tokens`).
  shortlist: Sequence[int] = ()

  def __post_init__(self):
    for name in ("max_input_length", "max_decode_length"):
      limits.whole(name, getattr(self, name), 1, limits.LONGEST, "give tokens")

  def write(self, directory: pathlib.Path) -> None:
    """Writes `inference.json` beside a checkpoint."""
    options = {
      "task_prefix": self.task_prefix,
      "max_input_length": self.max_input_length,
      "max_decode_length": self.max_decode_length,
      **({"shortlist": list(self.shortlist)} if self.shortlist else {}),
    }
    storage.write_atomically(
      directory / "inference.json", json.dumps(options, indent=1) + "\n"
    )


@arguments.checked()
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
  """Trains (or goes on training) and exports the parameters with the best
  validation.

  Args:
    data, objective, config, export: what is trained, how, and what goes with
      the parameters.
    output_dir: of checkpoints, validations, and the exported model in `model/`.
    model: sizes; None takes those of `initial`. MLPs wider than those of
      `initial` begin as the same function (`parameters.wider`).
    initial: a checkpoint to start from (ours, Hugging Face's or T5X's), or the
      `output_dir` of an earlier run; None starts from random parameters.
    fresh: parts of the parameter tree of `initial` that start anew:
      ("exit_classifier",) to train stage two again on a checkpoint that has
      been through it.
    listener: told of scalars.

  Returns:
    The folder of the exported checkpoint.

  Raises:
    FileNotFoundError: there is no checkpoint at `initial`.
    ValueError: neither `model` nor `initial`, or they do not fit; a part in
      `fresh` that the tree lacks; a vocabulary larger than the model's. Errors
      of `loop.fit` besides.
    storage.LockedError: another process trains in `output_dir`.
  """
  folder = pathlib.Path(output_dir)
  loop.check_writable(folder)
  model, params, exits_trained = starting_point(
    model, initial, config.seed, fresh, objective.parts
  )
  vocabulary.check_fits(export.vocabulary, model.vocab_size)
  module = network.Transformer(model)
  with storage.lock(folder):
    state = loop.fit(
      updates.init_state(params, config, objective),
      data.train,
      updates.make_train_step(module, config, objective, params),
      evaluator(module, objective, data),
      config,
      output_dir=folder,
      listener=listener,
    )
    target = folder / sources.MODEL_FOLDER
    trained = (
      objective.teaches_layers(model.num_decoder_layers) or exits_trained
    )
    checkpoints.save(
      target,
      jax.tree.map(np.asarray, state.params),
      model,
      vocabulary=export.vocabulary,
      exits_trained=trained,
    )
    export.write(target)
  return target


def starting_point(
  model: network.T5Config | None,
  initial: str | None,
  seed: int,
  fresh: Sequence[str] = (),
  parts: Sequence[str] = (),
) -> tuple[network.T5Config, Any, bool | None]:
  """Sizes, parameters at step 0, and `exits_trained` as in
  `checkpoints.Checkpoint`. Exit parts that `initial` lacks are added, those in
  `parts` whatever its sizes say; `fresh` begin anew.
  """
  if model is not None:
    # Gin makes a subclass of what it configures: equality and hashing want the
    # class itself.
    fields: dict[str, Any] = dataclasses.asdict(model) | dict.fromkeys(
      parts, True
    )
    model = network.T5Config(**fields)
  if initial is None:
    if model is None:
      raise ValueError(
        "Expected `model` or `initial`: sizes to start from random "
        "parameters, or a checkpoint,"
        " got neither; bind `run.train.model` or `run.train.initial`."
      )
    return model, updates.init_params(model, seed), False
  stored = checkpoints.load(sources.find_checkpoint(initial))
  held = dict.fromkeys(("exit_classifier", *parts), True)
  model = model or dataclasses.replace(stored.config, **held)
  params = parameters.add_exit_parts(stored.params, model)
  if model.mlp_dim > stored.config.mlp_dim:
    widths = stored.config.mlp_dim, model.mlp_dim
    _LOG.warning(
      "MLPs of `initial` are made wider, %d units each to %d.", *widths
    )
    params = parameters.wider(params, stored.config, model.mlp_dim, seed)
  parameters.check(params, model)
  if fresh:
    params = parameters.renew(params, updates.init_params(model, seed), fresh)
  return model, jax.tree.map(jnp.asarray, params), stored.exits_trained


def evaluator(
  module: network.Transformer, objective: objectives.Objective, data: Data
) -> Callable[[Any], dict[str, float]]:
  """Parameters -> the validation scalars of every source of `data`, without
  dropout and over every layer.
  """
  one = jax.jit(
    lambda params, batch: objective.loss(module, params, batch, None)[1]
  )
  batches = {
    name: [
      source.batch(step)
      for step in range(data.num_validation_batches.get(name, 8))
    ]
    for name, source in data.validation.items()
  }

  def evaluate(params: Any) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for name, rows in batches.items():
      metrics = functools.reduce(
        operator.add, [one(params, batch) for batch in rows]
      )
      prefix = f"{name}/" if scalars else ""
      scalars |= {
        prefix + key: value for key, value in metrics.scalars().items()
      }
    return scalars

  return evaluate
