"""The adapter to T5X: the only file of this package that imports it.

    from calm.t5x import models        # in a gin file, in place of `from t5x import models`

`EncoderDecoderModel` is T5X's, trained at every decoder layer and decoded with early exit in
T5X's own loops. T5X is not on the package index; its README says how to install it.
"""

import functools
import inspect
import logging
import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

# Where T5X is missing, the type checker takes this folder for it.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import jax
import jax.numpy as jnp
from flax import core as flax_core
from flax import linen as nn
from flax import traverse_util

try:
  import clu.metrics as clu_metrics
  import tensorflow as tf
  from t5x import checkpoints as t5x_checkpoints
  from t5x import decoding as t5x_decoding
  from t5x import gin_utils
  from t5x import losses as t5x_losses
  from t5x import metrics as t5x_metrics
  from t5x import models as t5x_models
  from t5x import optimizers as t5x_optimizers
  from t5x import partitioning as t5x_partitioning
  from t5x import train_state as t5x_train_state
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    f"Expected T5X for calm.t5x.models, got no {error.name!r} that is installed; install"
    " T5X from its repository (https://github.com/google-research/t5x), or train with"
    " `calm train`.",
    name=error.name,
  ) from error

from calm import exits
from calm.decode import compiled, engines, program
from calm.exits import confidence, schedules
from calm.t5 import caches, network, parameters
from calm.t5.network import Params
from calm.t5x import bindings, loops, meshes, stored
from calm.training import distillation, objectives

Batch = Mapping[str, jax.Array]

_LOG = logging.getLogger(__name__)

greedy_decode = loops.greedy_decode
config_of = stored.config_of


class EncoderDecoderModel(t5x_models.EncoderDecoderModel):
  """T5X's encoder-decoder model with an exit at every decoder layer."""

  def __init__(
    self,
    module: nn.Module | None = None,
    input_vocabulary: Any = None,
    output_vocabulary: Any = None,
    optimizer_def: Any = None,
    decode_fn: Any = None,
    feature_converter_cls: Any = None,
    label_smoothing: float | None = None,
    z_loss: float | None = None,
    loss_normalizing_factor: Any = None,
    default_decoder_params: t5x_models.DecoderParams | None = None,
    *,
    rule: exits.Rule | None = None,
    threshold: float = schedules.NEVER_EXIT,
    shortlist: Sequence[int] | None = None,
    objective: objectives.Objective | None = None,
    engine: engines.Engine | None = None,
    split_rows: bool | None = None,
    whole_decoder: bool = False,
    matmul_precision: str | None = None,
    exit_maps: tuple[Sequence[int], int] | None = None,
    calibration: stored.Calibrated | None = None,
  ):
    """T5X's ten arguments, and what early exit adds.

    Of T5X's arguments those that are None are what gin binds for T5X's own class, or its
    defaults; what gin binds for T5X's methods holds for this model's. `label_smoothing` is 0
    only, and embedding rows beyond the output vocabulary's pieces are never emitted.

    Args:
      module: `calm.t5.network.Transformer`, or T5X's own T5 1.1 `network.Transformer`, which is
        built anew from its `config`: with an exit classifier only where something needs it.
      input_vocabulary, output_vocabulary, feature_converter_cls, label_smoothing, z_loss,
        loss_normalizing_factor, default_decoder_params: as in T5X.
      optimizer_def: as in T5X; `exit_classifier_optimizer` for stage two.
      decode_fn: T5X's `beam_search` or `temperature_sample`, or `greedy_decode`.
      rule: how a token goes through the layers; None is the paper's softmax confidence.
        `exits.Speculative` needs `decode_fn=greedy_decode`.
      threshold: lambda where `decoder_params` gives none. At `NEVER_EXIT` nothing is measured:
        the program is the full model's.
      shortlist: likely tokens, for the measures 'shortlist' and 'probe'.
      objective: the training stage; None is Eq. 6 with this `z_loss`.
      engine: how decode steps run, as in `program.Program`; None takes the fastest for the
        rows that a device decodes.
      split_rows: on a mesh, whether each device decodes rows of its own with the decoder's
        weights whole, exchanging nothing; otherwise every step is the whole mesh's, as T5X's
        are. None splits where those weights take at most `meshes.APART_BYTES`.
      whole_decoder: for inference on a mesh with a model axis: where rows are split, whether
        the decoder's weights stay whole on every device (2 GiB of float32 at most), so that no
        batch gathers them.
      matmul_precision: of products of float32 matrices in decoding: 'default', 'high' or
        'highest'; None takes what JAX is configured to. A calibration records it.
      exit_maps: (1-based layers, rank): layers that have a translator and, unless the rank is
        0, learned propagation, whatever the module says; None: as it says.
      calibration: decode at the threshold of this calibration, in place of `threshold`, and
        refuse what it was not made for: another checkpoint, vocabulary, rule, length, dtype.

    Raises:
      TypeError: one of the first four is neither given nor bound, or `threshold` is no number.
      ValueError: another architecture, label smoothing, or what `bindings.check` refuses.
    """
    given = dict(
      module=module,
      input_vocabulary=input_vocabulary,
      output_vocabulary=output_vocabulary,
      optimizer_def=optimizer_def,
      decode_fn=decode_fn,
      feature_converter_cls=feature_converter_cls,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
      loss_normalizing_factor=loss_normalizing_factor,
      default_decoder_params=default_decoder_params,
    )
    if module is None and bindings.of(network.Transformer):  # one of configs/models/
      given["module"] = bindings.configured(network.Transformer)()
    theirs = bindings.resolve(given, t5x_models.EncoderDecoderModel, tuple(given)[:4])
    if theirs.get("label_smoothing"):
      raise ValueError(
        f"Expected `label_smoothing` of 0, got {theirs['label_smoothing']}; the layer-weighted"
        " loss has none: leave it out."
      )
    rule = rule or exits.DynamicExits(confidence.Softmax())
    bindings.check(rule, threshold, matmul_precision)
    if calibration is not None and threshold != schedules.NEVER_EXIT:
      raise ValueError(
        f"Expected THRESHOLD or CALIBRATION, got both ({threshold:g}); leave THRESHOLD out."
      )
    objective = objective or objectives.LayerWeighted(z_loss=theirs.get("z_loss", 0.0))
    parts = stored.needed_parts(rule, objective)
    theirs["module"] = network.Transformer(config_of(theirs["module"], parts, exit_maps))
    super().__init__(**theirs)
    bindings.bind_methods(self, t5x_models.EncoderDecoderModel)
    self.rule = rule
    self.threshold = threshold
    self.shortlist = shortlist
    self.objective = objective
    self.engine = engine
    self.split_rows = split_rows
    self.whole_decoder = whole_decoder
    self.matmul_precision = matmul_precision
    bindings.hold_checkpoints_to(stored.refuse_missing_parts)
    self.calibration = None if calibration is None else calibration.load(self)
    # Warnings: T5X's scripts show no less of what other packages log.
    if self.calibration is not None:
      self.threshold = self.calibration.threshold
      _LOG.warning("%s (%s)", self.calibration.guarantee, self.calibration.digest)
    _LOG.warning(bindings.described(rule, self.threshold, self.config.num_decoder_layers))

  @property
  def config(self) -> network.T5Config:
    """The model's sizes."""
    return self.module.config

  @property
  def is_greedy(self) -> bool:
    """Whether it decodes by `greedy_decode`, as it is or as gin configures it."""
    return inspect.unwrap(self._decode_fn) is greedy_decode

  def get_initial_variables(self, *args: Any, **kwargs: Any) -> Any:
    """As T5X's; with `whole_decoder`, the decoder has axes that no mesh axis divides."""
    found = super().get_initial_variables(*args, **kwargs)
    stays = self.whole_decoder and self.splits_rows(found["params"])
    return meshes.kept_whole(found) if stays else found

  def loss_fn(self, params: Params, batch: Batch, dropout_rng: jax.Array | None):
    """The objective's loss and its metrics, layer by layer, under T5X's names.

    `accuracy` and `cross_ent_loss` are those of the last layer, as T5X's own model reports;
    `accuracy/layer_i` and `loss/layer_i` are each layer's, per token.
    """
    factor, weights = t5x_losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    if weights is None:
      weights = jnp.ones(batch["decoder_target_tokens"].shape, jnp.float32)
    weighted = {**batch, "decoder_loss_weights": jnp.asarray(weights, jnp.float32)}
    loss, sums = self.objective.loss(self.module, params, weighted, dropout_rng)
    penalty = sums.z_loss
    if factor is not None:
      loss, penalty = loss / factor, penalty / factor
    metrics = _metrics(loss, penalty, sums, weighted)
    if isinstance(self.objective, distillation.ExitMaps):  # layers without maps: 0 / 0
      layers = range(1, self.config.num_decoder_layers)
      for layer in {*layers} - {*self.config.exit_translators}:
        del metrics[f"accuracy/layer_{layer}"], metrics[f"loss/layer_{layer}"]
    return loss, metrics

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    decoder_params: MutableMapping[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool = False,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Decodes a batch with early exit, in T5X's own loop or in `greedy_decode`.

    Args:
      params, batch, rng, return_all_decodes, num_decodes: as in T5X.
      decoder_params: as in T5X; left as it is. `threshold` (lambda, [] or [batch], may be
        traced) is taken out of it: the decode function never sees it.
      prompt_with_targets: as in T5X; the prefix runs every layer of the rule, is not counted,
        and schedules count tokens from its end.

    Returns:
      Tokens [batch, length] (or [batch, num_decodes, length]), and `scores` [batch],
      `threshold` [batch], `exit_layers`, `confidences` and `rejected_confidences` [batch,
      length] (or with the axis of decodes after the first). Without a threshold nothing was
      measured: `scores` and `exit_layers` only.
    """
    defaults = self._default_decoder_params
    return_all = (
      defaults.return_all_decodes if return_all_decodes is None else return_all_decodes
    )
    num_decodes = defaults.num_decodes if num_decodes is None else num_decodes
    options = meshes.with_rng(dict(decoder_params or {}), rng)
    given = options.pop("threshold", None)
    rule, threshold = loops.rule_and_threshold(self.rule, self.threshold, given)
    options.setdefault("eos_id", self.output_vocabulary.eos_id or 1)
    eos_id = self.output_vocabulary.eos_id
    prefix = loops.prefix_of(batch["decoder_input_tokens"], eos_id, prompt_with_targets)
    mesh, num_rows = _context_mesh(), prefix.shape[0]
    if self.calibration is not None and given is None:
      together = self.rows_of_a_device(params, mesh, num_rows)
      stored.refuse_batch(self.calibration, params, batch, together)

    with compiled.at_precision(self.matmul_precision):
      axes = meshes.row_axes(mesh, num_rows) if self.splits_rows(params) else ()
      at_rest = self.whole_decoder and meshes.may_stay_whole(params)
      whole = functools.partial(meshes.whole, at_rest=at_rest)
      weights = self._weights(whole(params, mesh, self.config.dtype) if axes else params)
      encoded = self._encode(params, weights, batch["encoder_input_tokens"])
    threshold = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (num_rows,))
    engine = meshes.engine_over(self.engine, num_rows, apart=bool(axes) or mesh.size <= 1)
    loop = loops.Loop(self.config, rule, prefix.shape[1], engine)
    by_row, traced, static = meshes.split_options(options, num_rows)
    decode = functools.partial(self._decode_rows, loop, num_decodes, static)
    key, rows = meshes.key_of(options, self._decode_fn), (prefix, encoded, threshold, by_row)
    with compiled.at_precision(self.matmul_precision):
      over_rows = meshes.over_rows(decode, mesh, axes, one_draw="temperature" in by_row)
      decodes, aux = over_rows((weights.decoder, traced), rows, key)
    pick = (lambda x: x) if return_all else (lambda x: x[:, -1])
    aux = jax.tree.map(pick, aux)
    if isinstance(rule, exits.DynamicExits):
      # Never without one: infer.py writes it as JSON, which has no infinity.
      aux["threshold"] = threshold
    return pick(decodes), aux

  def predict_batch_with_exits(
    self, params: Params, batch: Batch, **options: Any
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`predict_batch_with_aux` as a tuple of fixed length: tokens, scores and exit layers.

    For exports (`CustomInferenceMode.model_fn_name`, or `jax.export`), whose 'predict' mode
    expects tokens and scores alone. The batch size may be symbolic.
    """
    tokens, aux = self.predict_batch_with_aux(params, batch, **options)
    return tokens, aux["scores"], aux["exit_layers"]

  def splits_rows(self, params: Params) -> bool:
    """Whether each device of a mesh decodes rows of its own: `split_rows`, or what it takes."""
    weights = jax.eval_shape(self._weights, params)
    return meshes.fits(weights.decoder) if self.split_rows is None else self.split_rows

  def rows_of_a_device(self, params: Params, mesh: Any, num_rows: int) -> int:
    """Rows of a batch that a device of a mesh decodes together."""
    axes = meshes.row_axes(mesh, num_rows) if self.splits_rows(params) else ()
    return num_rows // math.prod(mesh.shape[axis] for axis in axes)

  def _decode_rows(self, loop, num_decodes, static, shared, batch, rng):
    """Decodes of the rows that this function is given, and what is known of them."""
    (weights, traced), (prefix, encoded, threshold, by_row) = shared, batch
    options = {**static, **traced, **by_row} | ({} if rng is None else {"decode_rng": rng})
    eos_id = options["eos_id"]
    rows = loops.make_rows(encoded, prefix, threshold, eos_id, num_decodes)
    watch = loops.watch(self._decode_fn, t5x_decoding.temperature_sample, options)
    if watch is not None:
      options[loops.CALLBACK] = watch
    decodes, scores, *same_pass = self._decode_fn(
      inputs=prefix,
      cache=loop.empty_cache(weights, rows, prefix.shape[0]),
      tokens_to_logits=loop.bind(weights, rows, eos_id, wide=not self.is_greedy),
      num_decodes=num_decodes,
      cache_offset=0,
      **options,
    )
    if watch is not None:
      same_pass = [watch.exits(num_decodes)]
    found = loop.exits_of(weights, rows, decodes, eos_id, same_pass)
    return decodes, {"scores": scores, **found}

  def _weights(self, params: Params) -> program.ModelWeights:
    pieces = self.output_vocabulary.vocab_size
    return program.model_weights(params, self.config, pieces, self.shortlist)

  def _encode(self, params, weights: program.ModelWeights, tokens: jax.Array) -> caches.Encoded:
    encoded = network.encode(params, self.config, tokens)
    return caches.cross_attention_inputs(weights.decoder, self.config, encoded, tokens)


def early_exit(model: t5x_models.EncoderDecoderModel, **added: Any) -> EncoderDecoderModel:
  """A T5X model, as it is configured, with early exit.

  For a gin file that includes one of T5X's own: `MODEL = @calm_models.early_exit()`, as
  configs/runs/early_exit.gin binds it.

  Args:
    model: T5X's `EncoderDecoderModel` over its T5 1.1 network.
    **added: what `EncoderDecoderModel` takes besides T5X's arguments.
  """
  theirs = t5x_models.EncoderDecoderModel
  bindings.refuse_subclass(model, theirs)
  # As gin configures our class: what is bound for it, here or in exit_classifier.gin, holds. By
  # position: of arguments by name gin would still make what sweep.gin binds for them.
  return bindings.configured(EncoderDecoderModel)(
    model.module,
    model.input_vocabulary,
    model.output_vocabulary,
    model.optimizer_def,
    model.decode_fn,
    model.FEATURE_CONVERTER_CLS,
    model._label_smoothing,
    model._z_loss,
    model._loss_normalizing_factor,
    model._default_decoder_params,
    **added,
  )


def __getattr__(name: str) -> Any:
  """What else T5X's module holds, for files that import this one in its place."""
  if name in ("DecoderOnlyModel", "PrefixLanguageModel"):
    raise TypeError(  # gin says nothing of an AttributeError's text
      f"Expected models.EncoderDecoderModel, got models.{name}, which has no exits here; import"
      " t5x.models for it."
    )
  return getattr(t5x_models, name)


class _ExitOptimizer(t5x_optimizers.MultiOptimizer):
  """T5X's, whose checkpoints hold the states of what it trains, and nothing for the others."""

  def __init__(self, optimizer: t5x_optimizers.OptimizerDef, parts: Sequence[str]):
    self._is_trained = lambda path: not {*parts}.isdisjoint(path.split("/"))
    chosen = traverse_util.ModelParamTraversal(lambda path, _: self._is_trained(path))
    super().__init__([(chosen, optimizer)])

  def state_dict(self, target, state):
    made = super().state_dict(target, state)
    flat = traverse_util.flatten_dict(made["state"]["param_states"], sep="/")
    kept = {path: leaf for path, leaf in flat.items() if self._is_trained(path)}
    made["state"]["param_states"] = traverse_util.unflatten_dict(kept, sep="/")
    return made

  def restore_state(self, opt_target, opt_state, state_dict):
    whole = super().state_dict(opt_target, opt_state)["state"]["param_states"]
    given = state_dict["state"]["param_states"]
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (whole, given)]
    states = traverse_util.unflatten_dict(flat[0] | flat[1], sep="/")
    state = {**state_dict["state"], "param_states": states}
    return super().restore_state(opt_target, opt_state, {**state_dict, "state": state})


def exit_classifier_optimizer(optimizer: Any) -> t5x_optimizers.MultiOptimizer:
  """Stage two's optimizer: exit classifier and probes alone; no other parameter is touched.

  Its checkpoints hold the states of these, so that T5X resumes a run (its own MultiOptimizer
  writes None for the others, and does not read that).
  """
  return _ExitOptimizer(optimizer, ("exit_classifier", "exit_probes"))


def exit_maps_optimizer(optimizer: Any) -> t5x_optimizers.MultiOptimizer:
  """The optimizer of `distillation.ExitMaps`: all exit parts of the decoder; as stage two's."""
  return _ExitOptimizer(optimizer, parameters.EXIT_PARTS)


def save_t5x_checkpoint(
  params: Params, config: network.T5Config, directory: str, *, train_step: int = 0
) -> str:
  """Writes parameters as a T5X checkpoint, for `INITIAL_CHECKPOINT_PATH`.

  Args:
    params: the tree of `config`.
    config: sizes.
    directory: made if missing; `checkpoint_<train_step>` appears in it.
    train_step: the step that T5X counts on from.

  Returns:
    The checkpoint's folder. It holds no optimizer state.
  """
  tokens = jnp.ones((1, 1), jnp.int32)
  init = functools.partial(network.Transformer(config).init, enable_dropout=False)
  variables = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)
  partitioner = t5x_partitioning.PjitPartitioner(num_partitions=1)
  state = t5x_train_state.InferenceState.create(flax_core.freeze(variables))
  state = state.replace(
    step=jnp.asarray(train_step, jnp.int32),
    params=flax_core.freeze(jax.tree.map(jnp.asarray, dict(params))),
  )
  directory = stored.absolute_path(directory)
  checkpointer = t5x_checkpoints.Checkpointer(state, partitioner, directory)
  checkpointer.save(state)
  return f"{directory}/checkpoint_{train_step}"


def summarize_config(
  model_dir: str, summary_writer: Any, step: int, calibration: str | None = None
) -> None:
  """T5X's `summarize_gin_config`, and the calibration of the run beside it.

  Args:
    model_dir, summary_writer, step: as T5X's scripts give them.
    calibration: the file whose sentence and digest lie beside the outputs; None: there is none.
  """
  gin_utils.summarize_gin_config(model_dir, summary_writer, step)
  if calibration is not None and jax.process_index() == 0:
    tf.io.gfile.copy(calibration, os.path.join(model_dir, "calibration.json"), overwrite=True)


def _context_mesh() -> Any:
  """The mesh that a partitioned step runs on: T5X's partitioner enters it."""
  mesh = t5x_partitioning.pxla.thread_resources.env.physical_mesh
  return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def _metrics(
  loss: jax.Array, z_loss: jax.Array, sums: objectives.BatchMetrics, batch: Batch
) -> dict[str, Any]:
  targets, mask = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
  segment_ids = {
    name.removesuffix("_segment_ids"): ids
    for name, ids in batch.items()
    if name.endswith("_segment_ids")
  } or {name: batch[name] != 0 for name in ("encoder_input_tokens", "decoder_target_tokens")}
  metrics = t5x_models.compute_base_metrics(
    # No logits are kept: a stand-in of one class, whose accuracy is replaced below.
    logits=jnp.zeros((*targets.shape, 1), jnp.float32),
    targets=targets,
    mask=mask,
    loss=loss,
    z_loss=z_loss,
    segment_ids=segment_ids,
  )
  kind: Any = clu_metrics.Average
  average = lambda total, count: kind(total=total, count=count)
  last = sums.cross_entropy[-1]
  metrics |= {
    "accuracy": average(sums.correct[-1], sums.layer_weight[-1]),
    "cross_ent_loss": t5x_metrics.AveragePerStep(total=last),
    "cross_ent_loss_per_all_target_tokens": average(last, jnp.array(targets.size)),
  }
  for i in range(sums.correct.shape[0]):
    count = sums.layer_weight[i]
    metrics[f"accuracy/layer_{i + 1}"] = average(sums.correct[i], count)
    metrics[f"loss/layer_{i + 1}"] = average(sums.cross_entropy[i], count)
  return metrics
