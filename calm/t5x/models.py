# Copyright 2026 The CALM Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The adapter to T5X: the only file of this package that imports it.

    from calm.t5x import models  # in a gin file, for `from t5x import models`

`EncoderDecoderModel` is T5X's, trained at every decoder layer and decoded with
early exit in T5X's own loops. configs/README.md says how to install T5X.
"""

import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

# Where T5X is missing, the type checker takes this folder for it.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import clu.metrics as clu_metrics
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from flax import core as flax_core
from gin import config as gin_config
from t5x import checkpoints as t5x_checkpoints
from t5x import losses as t5x_losses
from t5x import metrics as t5x_metrics
from t5x import models as t5x_models
from t5x import partitioning as t5x_partitioning
from t5x import train_state as t5x_train_state

from calm import arguments, exits, inference
from calm.calibrate import thresholds
from calm.decode import compiled, engines, program
from calm.exits import confidence, schedules
from calm.t5 import caches, costs, network
from calm.t5.network import Params
from calm.t5x import loops, stored
from calm.training import objectives

Batch = Mapping[str, jax.Array]
_REQUIRED = ("module", "input_vocabulary", "output_vocabulary", "optimizer_def")
_LOG = logging.getLogger(__name__)

greedy_decode = loops.greedy_decode


class EncoderDecoderModel(t5x_models.EncoderDecoderModel):
  """T5X's encoder-decoder model with an exit at every decoder layer."""

  # Of a model that is built without this constructor, as T5X's own tests do.
  whole_decoder: bool = False

  def __init__(
    self,
    *args: Any,
    rule: exits.StepRule | None = None,
    threshold: float = schedules.NEVER_EXIT,
    shortlist: Sequence[int] | None = None,
    objective: objectives.Objective | None = None,
    whole_decoder: bool = False,
    matmul_precision: inference.options.Precision | None = None,
    exit_maps: tuple[Any, int] | None = None,
    calibration: stored.Calibrated | None = None,
    **kwargs: Any,
  ):
    """T5X's ten arguments, and what early exit adds.

    Of T5X's arguments those that are None or left out are what gin binds for
    T5X's own class, or its defaults. `module` is the Transformer of T5X's
    examples/t5, built anew from its sizes. `label_smoothing` is 0 only.

    Args:
      rule: how a token goes through the layers; None is the paper's softmax
        confidence.
      threshold: lambda where `decoder_params` gives none. At `NEVER_EXIT`
        nothing is measured: the program is the full model's.
      shortlist: likely tokens, for the measures 'shortlist' and 'probe'.
      objective: the training stage; None is Eq. 6 with T5X's `z_loss`.
      whole_decoder: for inference: the decoder stays whole on every device
        where rows are split, so that no batch gathers it.
      matmul_precision: of `inference.DecodeOptions`.
      exit_maps: (1-based layers, rank): layers that have a translator and,
        unless the rank is 0, learned propagation; None: as the module says.
      calibration: decode at its threshold, and refuse what it was not made for.

    Raises:
      TypeError: one of T5X's first four is neither given nor bound.
      ValueError: another architecture, or an argument that does not fit.
    """
    base = t5x_models.EncoderDecoderModel
    given = inspect.signature(base).bind_partial(*args, **kwargs).arguments
    theirs = stored.given_or_bound(base, given)
    if missing := [f"`{name}`" for name in _REQUIRED if name not in theirs]:
      raise TypeError(
        f"Expected {', '.join(missing)} of EncoderDecoderModel, got none; bind"
        " them for T5X's class in a gin file, or give them."
      )
    rule = rule or exits.DynamicExits(confidence.Softmax())
    z_loss = theirs.get("z_loss", 0.0)
    objective = objective or objectives.LayerWeighted(z_loss=z_loss)
    _check(rule, threshold, objective, theirs)
    if calibration is not None and threshold != schedules.NEVER_EXIT:
      raise ValueError(
        f"Expected THRESHOLD or CALIBRATION, got both ({threshold:g}); leave"
        " THRESHOLD out."
      )
    inference.DecodeOptions(matmul_precision=matmul_precision)  # is checked
    measured = getattr(getattr(rule, "measure", None), "part", None)
    module = theirs["module"]
    parts = (*objective.parts, measured)
    config = stored.config_of(module, parts, exit_maps)
    theirs["module"] = network.Transformer(config)
    super().__init__(**theirs)
    self.rule = rule
    self.threshold = threshold
    self.shortlist = shortlist
    self.objective = objective
    self.whole_decoder = whole_decoder
    self.matmul_precision = matmul_precision
    self.calibration = calibration and calibration.load(self)
    # Warnings: T5X's scripts show no less of what other packages log.
    if self.calibration is not None:
      self.threshold = self.calibration.threshold
      _LOG.warning(
        "%s (%s)", self.calibration.guarantee, self.calibration.digest
      )
    if self.threshold == schedules.NEVER_EXIT and rule.reads_threshold:
      _LOG.warning("no exits, unless a call gives a threshold")
    else:
      _LOG.warning("exits: threshold %g, %s", self.threshold, rule)

  @property
  def config(self) -> network.T5Config:
    """The model's sizes."""
    return self.module.config

  @property
  def is_greedy(self) -> bool:
    """Whether it decodes by `greedy_decode`, also as gin configures it."""
    return inspect.unwrap(self.decode_fn) is greedy_decode

  def get_initial_variables(self, *args: Any, **kwargs: Any) -> Any:
    """T5X's; with `whole_decoder` no mesh axis divides the decoder's axes."""
    found = super().get_initial_variables(*args, **kwargs)
    stays = self.whole_decoder and self._splits_rows(found["params"])
    return loops.kept_whole(found) if stays else found

  def loss_fn(
    self, params: Params, batch: Batch, dropout_rng: jax.Array | None
  ):
    """The objective's loss, T5X's metrics of the last layer, and each layer's
    `accuracy/layer_i`, `loss/layer_i` and `agreement/layer_i` (share of tokens
    of which it and the last layer say the same)."""
    factor, weights = t5x_losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    # T5X takes tokens of any dtype.
    targets = jnp.asarray(batch["decoder_target_tokens"], jnp.int32)
    weights = jnp.ones(targets.shape) if weights is None else weights
    weights = jnp.asarray(weights, jnp.float32)
    weighted = {**batch, "decoder_loss_weights": weights}
    weighted["decoder_target_tokens"] = targets
    loss, sums = self.objective.loss(self.module, params, weighted, dropout_rng)
    penalty = sums.z_loss
    if factor is not None:
      loss, penalty = loss / factor, penalty / factor
    end = "_segment_ids"
    kinds = ("encoder_input", "decoder_target")
    ids = {k.removesuffix(end): x for k, x in batch.items() if k.endswith(end)}
    names = (f"{kind}_tokens" for kind in kinds)
    found = self._compute_metrics(
      # No logits are kept: a stand-in of one class, whose accuracy is replaced.
      logits=jnp.zeros((*targets.shape, 1), jnp.float32),
      targets=targets,
      mask=weights,
      loss=loss,
      z_loss=penalty,
      segment_ids=ids or {name: batch[name] != 0 for name in names},
    )
    layers = self.objective.measured_layers(self.config)
    return loss, found | _layer_metrics(sums, layers, targets.size)

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    decoder_params: MutableMapping[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool | None = None,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Decodes a batch with early exit, in T5X's loop or in `greedy_decode`.

    Arguments are T5X's; what is None is what gin binds for T5X's method, or its
    default. `threshold` of `decoder_params` is lambda, [] or [batch], and may
    be traced. A prefix runs every layer, is not counted, and schedules count
    tokens from its end.

    Returns:
      Tokens [batch, length] (or [batch, num_decodes, length]), and `scores`
      [batch], `relative_cost` [batch] (FLOPs of the decoder over those at full
      depth), `threshold` [batch], `exit_layers`, `confidences` and
      `rejected_confidences` [batch, length] (or with the axis of decodes after
      the first). Without a threshold nothing was measured: the last two and the
      threshold are left out.
    """
    given = {
      "decoder_params": decoder_params,
      "return_all_decodes": return_all_decodes,
      "num_decodes": num_decodes,
      "prompt_with_targets": prompt_with_targets,
    }
    base = t5x_models.EncoderDecoderModel.predict_batch_with_aux
    given = stored.given_or_bound(base, given)
    given = vars(self._default_decoder_params) | given
    options: dict[str, Any] = {"eos_id": self.output_vocabulary.eos_id or 1}
    options |= given.get("decoder_params") or {}
    if rng is not None and options.get("decode_rng") is not None:
      raise ValueError(
        "Expected one random key, got `rng` and `decoder_params['decode_rng']`;"
        " leave one out."
      )
    key = options.pop("decode_rng", None) if rng is None else rng
    asked = options.pop("threshold", None)
    if asked is not None and not isinstance(asked, jax.core.Tracer):
      for value in np.ravel(asked).tolist():
        thresholds.parse_threshold(value)
    threshold = self.threshold if asked is None else asked
    rule = self.rule
    never = asked is None and threshold == schedules.NEVER_EXIT
    if never and isinstance(rule, exits.DynamicExits):
      rule = exits.StaticExit()  # full depth, and nothing is measured
    prefix = batch["decoder_input_tokens"]
    if not given.get("prompt_with_targets"):
      prefix = jnp.zeros_like(prefix)
    elif isinstance(rule, exits.OracleExit):
      raise ValueError(
        "Expected no prefix with OracleExit, got `prompt_with_targets`, whose"
        " tokens it would let exit; choose exits.DynamicExits."
      )
    # As T5X does: an EOS at the prompt's end would end it.
    prefix = prefix * (prefix != options["eos_id"])
    num_rows = prefix.shape[0]
    mesh = _context_mesh()
    threshold = jnp.asarray(threshold, jnp.float32)
    threshold = jnp.broadcast_to(threshold, (num_rows,))
    per_row = any(np.shape(x)[:1] == (num_rows,) for x in options.values())
    axes = () if per_row else self.row_axes(params, mesh, num_rows)
    if self.calibration is not None and asked is None:
      together = num_rows // math.prod(mesh.shape[axis] for axis in axes)
      stored.refuse_batch(self.calibration, params, batch, together)
    decodes, aux = self._decode(
      params,
      batch["encoder_input_tokens"],
      (prefix, threshold),
      (rule, given["num_decodes"], options),
      jax.random.PRNGKey(0) if key is None else key,  # T5X's default
      axes,
    )
    lengths = batch["encoder_input_tokens"].shape[1], prefix.shape[1]
    aux["relative_cost"] = self._relative_cost(rule, aux, *lengths)
    if not given["return_all_decodes"]:
      decodes, aux = jax.tree.map(lambda x: x[:, -1], (decodes, aux))
    if isinstance(rule, exits.DynamicExits):
      # Never without one: infer.py writes it as JSON, which has no infinity.
      aux["threshold"] = threshold
    return decodes, aux

  def predict_batch_with_exits(
    self, params: Params, batch: Batch, **options: Any
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, scores and exit layers, for `CustomInferenceMode.model_fn_name`
    or `jax.export`; the batch size may be symbolic."""
    tokens, aux = self.predict_batch_with_aux(params, batch, **options)
    return tokens, aux["scores"], aux["exit_layers"]

  def row_axes(self, params: Params, mesh: Any, num_rows: Any):
    """The axes of a mesh whose devices decode rows of their own."""
    return loops.row_axes(mesh, num_rows) if self._splits_rows(params) else ()

  def _splits_rows(self, params: Params) -> bool:
    weights = jax.tree.leaves(jax.eval_shape(self._weights, params))
    sizes = (leaf.size * leaf.dtype.itemsize for leaf in weights)
    return sum(sizes) <= loops.APART_BYTES

  def _relative_cost(self, rule, aux, input_length, cache_length):
    """FLOPs of the decoder over those at full depth, of every decode."""
    step = costs.decoding_costs(
      self.config,
      rule=rule,
      input_length=input_length,
      cache_length=cache_length,
      num_pieces=self.output_vocabulary.vocab_size,
      shortlist=len(self.shortlist or ()),
    )
    flops = [step.early(i + 1).flops for i in range(step.num_layers)]
    relative = jnp.array([0.0, *flops]) / step.full.flops  # 0 is padding
    layers = aux["exit_layers"]
    tokens = jnp.maximum(jnp.sum(layers > 0, axis=-1), 1)
    return jnp.sum(relative[layers], axis=-1) / tokens

  def _decode(self, params, inputs, rows, how, key, axes):
    """Decodes of a batch, and what is known of them."""
    (prefix, threshold), (rule, num_decodes, options) = rows, how
    mesh = _context_mesh()
    num_rows = prefix.shape[0]
    # The plain engine takes a symbolic number of rows, and exchanges least
    # where steps are the whole mesh's; with T5X's loops, whose exits are a
    # second program, what is compiled soonest. None: the fastest.
    engine = None if self.is_greedy else engines.default_engine(rule, rows=1)
    if not isinstance(num_rows, int) or (mesh.size > 1 and not axes):
      engine = engines.Eager
    arrays = {k: x for k, x in options.items() if isinstance(x, jax.Array)}

    def decode(shared, rows, key):
      (weights, arrays), (prefix, encoded, threshold) = shared, rows
      given = {**options, **arrays, "decode_rng": key}
      rows = loops.make_rows(encoded, prefix, threshold, num_decodes)
      loop = loops.Loop(
        self.config, rule, weights, rows, given["eos_id"], engine
      )
      decodes, scores, *made = self.decode_fn(
        inputs=prefix,
        cache=loop.empty_cache(prefix.shape[0]),
        tokens_to_logits=loop,
        num_decodes=num_decodes,
        cache_offset=0,
        **given,
      )
      return decodes, {"scores": scores, **loop.exits_of(decodes, *made)}

    with compiled.at_precision(self.matmul_precision):
      weights = self._weights(params)
      if axes:
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        weights = jax.lax.with_sharding_constraint(weights, place)
      encoded = network.encode(params, self.config, inputs)
      encoded = caches.cross_attention_inputs(
        weights, self.config, encoded, inputs
      )
      return loops.over_rows(decode, mesh, axes)(
        (weights, arrays), (prefix, encoded, threshold), key
      )

  def _weights(self, params: Params) -> Any:
    sizes = self.config, self.output_vocabulary.vocab_size, self.shortlist
    return program.model_weights(params, *sizes).decoder


@arguments.checked()
def _check(
  rule: exits.StepRule,
  threshold: float,
  objective: objectives.Objective,
  theirs: Mapping[str, Any],
) -> None:
  """Raises for what would not decode, or not train as it says."""
  thresholds.parse_threshold(threshold)
  if threshold != schedules.NEVER_EXIT and not rule.reads_threshold:
    raise ValueError(
      f"Expected no `threshold` with {type(rule).__name__}, which compares"
      f" none, got {threshold}; leave it out, or choose `exits.DynamicExits`."
    )
  if theirs.get("label_smoothing"):
    raise ValueError(
      f"Expected `label_smoothing` of 0, got {theirs['label_smoothing']}; the"
      " layer-weighted loss has none: leave it out."
    )
  fields = getattr(theirs["optimizer_def"], "hyper_params", None)
  for name in ("weight_decay_rate", "weight_decay_rate_lr_exponent"):
    decay = getattr(fields, name, None)
    if decay and not objective.trains(("encoder",)):
      raise ValueError(
        f"Expected no `{name}` with {type(objective).__name__}, got {decay},"
        " which would move what it freezes; leave it out."
      )


def _context_mesh() -> Any:
  """The mesh that a partitioned step runs on: T5X's partitioner enters it."""
  mesh = t5x_partitioning.pxla.thread_resources.env.physical_mesh
  return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def _layer_metrics(
  sums: objectives.BatchMetrics, layers: Sequence[int], num_tokens: int
) -> dict[str, Any]:
  """The last layer's metrics by T5X's names, and those of 1-based layers."""
  kind: Any = clu_metrics.Average

  def average(total, count):
    return kind(total=total, count=count)

  last = sums.cross_entropy[-1]
  tokens = jnp.array(num_tokens)
  names = ("accuracy", "loss", "agreement")
  totals = (sums.correct, sums.cross_entropy, sums.agreement)
  return {
    "accuracy": average(sums.correct[-1], sums.layer_weight[-1]),
    "cross_ent_loss": t5x_metrics.AveragePerStep(total=last),
    "cross_ent_loss_per_all_target_tokens": average(last, tokens),
    **{
      f"{name}/layer_{i}": average(total[i - 1], sums.layer_weight[i - 1])
      for name, total in zip(names, totals, strict=True)
      for i in layers
    },
  }


def exit_metrics(
  targets: Any, predictions: Any, aux_values: Mapping[str, Any]
) -> dict[str, float]:
  """A seqio metric function: `exits/mean_layer`, `exits/share_layer_<i>` of
  tokens that leave after layer i, and `exits/speedup`, the decoder's FLOPs at
  full depth over those spent."""
  del targets, predictions
  if "relative_cost" not in aux_values:
    return {}
  layers = np.asarray(aux_values["exit_layers"])
  tokens = np.sum(layers > 0, axis=-1)
  spent = np.sum(np.asarray(aux_values["relative_cost"]) * tokens)
  total = max(int(tokens.sum()), 1)
  kinds, counts = np.unique(layers[layers > 0], return_counts=True)
  shares = zip(kinds.tolist(), (counts / total).tolist(), strict=True)
  return {
    "exits/mean_layer": float(layers.sum() / total),
    "exits/speedup": float(tokens.sum() / max(spent, 1e-9)),
    **{f"exits/share_layer_{layer}": share for layer, share in shares},
  }


class Evaluator(seqio.Evaluator):
  """seqio's evaluator, as gin binds it, with `exit_metrics` in each task."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **stored.given_or_bound(seqio.Evaluator, kwargs))

  @functools.cached_property
  def eval_tasks(self) -> Sequence[seqio.Task]:
    """seqio's tasks, each with one metric more."""
    return [
      task.replace(metric_fns=[*task.metric_fns, exit_metrics])
      for task in super().eval_tasks
    ]

  def evaluate(
    self, *, predict_with_aux_fn: Callable[..., Any], **options: Any
  ) -> Any:
    """As seqio's; a task's plain predictions are those with exits."""
    predict: Any = functools.lru_cache(1)(predict_with_aux_fn)
    options["predict_fn"] = lambda dataset: predict(dataset)[0]
    return super().evaluate(predict_with_aux_fn=predict, **options)


@gin_config.register_finalize_hook
def _refuse_order(config: Any) -> None:
  """Refuses a network of T5X's that came after early_exit.gin."""
  # The module has the name that a file gave it.
  ours = re.compile(r"calm\.t5x\.\w+\.EncoderDecoderModel")
  has_exits = any(ours.fullmatch(name) for _, name in config)
  model = config.get(("MODEL", "gin.macro"), {}).get("value")
  kind = getattr(getattr(model, "configurable", None), "wrapped", None)
  if has_exits and kind is t5x_models.EncoderDecoderModel:
    raise ValueError(
      "Expected T5X's network file before the run or early_exit.gin, got it"
      " after: MODEL is T5X's own, without exits; give the network first."
    )


def save_t5x_checkpoint(
  params: Params, config: network.T5Config, directory: str, train_step: int = 0
) -> str:
  """Writes a T5X checkpoint without optimizer state, and returns its folder."""
  tokens = jnp.ones((1, 1), jnp.int32)
  init = functools.partial(
    network.Transformer(config).init, enable_dropout=False
  )
  variables = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)
  partitioner = t5x_partitioning.PjitPartitioner(num_partitions=1)
  create = t5x_train_state.InferenceState.create
  state = create(flax_core.freeze(variables)).replace(
    step=jnp.asarray(train_step, jnp.int32),
    params=flax_core.freeze(jax.tree.map(jnp.asarray, dict(params))),
  )
  directory = stored.absolute_path(directory)
  t5x_checkpoints.Checkpointer(state, partitioner, directory).save(state)
  return f"{directory}/checkpoint_{train_step}"
