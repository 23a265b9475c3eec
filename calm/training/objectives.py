"""What a training stage minimises, and which parameters it may touch."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from calm import arguments
from calm.exits import confidence
from calm.exits import layers as layers_lib
from calm.t5 import limits, network, parameters
from calm.t5.network import Params
from calm.training import losses

Batch = dict[str, jax.Array]


@struct.dataclass
class BatchMetrics:
  """Sums over one batch's real tokens; sums of sums are means of everything
  seen.
  """

  loss: jax.Array  # the objective, []
  weight: jax.Array  # number of real tokens, []
  cross_entropy: jax.Array  # negative log-likelihood a layer in nats, [layers]
  correct: jax.Array  # argmaxes that equal the target a layer
  # argmaxes that equal the last layer's; NaN where it was not computed
  agreement: jax.Array
  layer_weight: jax.Array  # tokens that each layer's sums are over, [layers]
  z_loss: jax.Array  # the part of the loss that penalises log(Z)^2, []

  def __add__(self, other: "BatchMetrics") -> "BatchMetrics":
    return jax.tree.map(jnp.add, self, other)

  def scalars(self) -> dict[str, float]:
    """Means (and the token count) by name and layer; layers not measured left
    out.
    """
    weight = max(float(self.weight), 1.0)
    values = {
      "loss": float(self.loss) / weight,
      "target_tokens": float(self.weight),
    }
    sums = {
      "loss": self.cross_entropy,
      "accuracy": self.correct,
      "agreement": self.agreement,
    }
    for layer, seen in enumerate(np.asarray(self.layer_weight)):
      for name, total in sums.items():
        if seen > 0 and not (name == "agreement" and np.isnan(total[layer])):
          values[f"{name}/layer_{layer + 1}"] = float(total[layer]) / float(
            seen
          )
    return values


def layer_metrics(
  num_layers: int,
  layers: jax.Array,
  loss,
  weight,
  sums: losses.LayerMetrics,
  z_loss,
) -> BatchMetrics:
  """Metrics of the 0-based `layers` that were measured, whose sums are
  [len(layers)].
  """

  def to_layers(x):
    return jnp.zeros(num_layers).at[layers].add(x)

  cross_entropy, correct, agreement = map(to_layers, sums)
  seen = to_layers(jnp.broadcast_to(weight, layers.shape))
  return BatchMetrics(
    loss, weight, cross_entropy, correct, agreement, seen, z_loss
  )


class Objective(abc.ABC):
  """One training stage, a frozen dataclass; a stage without `parts` trains the
  base model.
  """

  # Exit parts of the decoder that the model must hold for it, fields of
  # `T5Config`.
  parts: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def loss(
    self,
    module: network.Transformer,
    params: Params,
    batch: Batch,
    rng: jax.Array | None,
  ) -> tuple[jax.Array, BatchMetrics]:
    """The loss summed over real tokens, and metrics; `rng` None turns dropout
    off.
    """

  def trains(self, path: tuple[str, ...]) -> bool:
    """Whether the parameter at this path of the tree may change."""
    if self.parts:
      return not {*path}.isdisjoint(self.parts)
    return {*path}.isdisjoint(parameters.EXIT_PARTS)

  def teaches_layers(self, num_layers: int) -> bool:
    """Whether layers before the last learn to write."""
    return False

  def measured_layers(self, config: network.T5Config) -> tuple[int, ...]:
    """The 1-based layers that metrics are of."""
    return tuple(range(1, config.num_decoder_layers + 1))


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class LayerWeighted(Objective):
  """Stage one: Eq. 6, sum_i w_i NLL_i over all decoder layers.

  Attributes:
    weights: number of layers -> w_i; Eq. 6's i / sum(i), or
      `losses.last_layer_weights`.
    z_loss: T5X's penalty on log(Z)^2.
    sampled_layers: None computes every layer's head. k draws k layers a step
      with probabilities w_i instead: an unbiased estimate of Eq. 6 at k heads'
      cost, for machines where the vocabulary head outweighs the layers.
  """

  weights: Callable[[int], np.ndarray] = losses.layer_weights
  z_loss: float = 1e-4
  sampled_layers: int | None = None

  def __post_init__(self):
    check_terms(self.sampled_layers, z_loss=self.z_loss)

  def loss(self, module, params, batch, rng):
    normed = normed_states(module, params, batch, rng)
    num_layers = normed.shape[0]
    weights = jnp.asarray(self.weights(num_layers))
    k = self.sampled_layers
    if rng is not None and k is not None:
      chosen = jax.random.choice(
        jax.random.fold_in(rng, 1), num_layers, (k,), p=weights
      )
      chosen_weights = jnp.full((k,), 1.0 / k)
    else:
      chosen = jnp.arange(num_layers)
      chosen_weights = weights
    token_weights = batch["decoder_loss_weights"]
    loss, metrics = losses.layer_cross_entropy(
      normed[chosen],
      parameters.head_kernel(params, module.config),
      batch["decoder_target_tokens"],
      token_weights,
      chosen_weights,
      self.z_loss,
    )
    # the last layer may not be among those that were drawn
    if chosen_weights is not weights:
      metrics = metrics._replace(agreement=jnp.full(chosen.shape, jnp.nan))
    penalty = loss - jnp.sum(chosen_weights * metrics.cross_entropy)
    weight = jnp.sum(token_weights)
    return loss, layer_metrics(
      num_layers, chosen, loss, weight, metrics, penalty
    )

  def teaches_layers(self, num_layers):
    return bool(np.any(np.asarray(self.weights(num_layers))[:-1] > 0.0))


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class ExitClassifier(Objective):
  """Stage two: the exit classifier alone, everything else frozen (paper section
  3.5).

  Attributes:
    objective: `losses.classifier_loss` or `losses.geometric_classifier_loss`.
  """

  parts = ("exit_classifier",)
  objective: Callable[..., jax.Array] = losses.classifier_loss

  def loss(self, module, params, batch, rng):
    del rng  # the features must be those of inference: no dropout
    normed = jax.lax.stop_gradient(normed_states(module, params, batch, None))
    logits = classified(params, normed)
    kernel = parameters.head_kernel(params, module.config)
    predictions = losses.layer_predictions(normed, kernel)
    return _stage_two(
      self.objective, logits, predictions, batch["decoder_loss_weights"]
    )


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class ExitProbes(Objective):
  """Stage two of the measure 'probe': every layer's own probe, everything else
  frozen.

  Attributes:
    shortlist: token ids whose logits the probes read; export the same ones.
    classifier: whether the exit classifier is trained beside them, in the same
      pass; loss and metrics are the probes' and its loss is added.
  """

  shortlist: Sequence[int]
  classifier: bool = False

  def __post_init__(self):
    # the gap of the two likeliest would be infinite
    if len(set(self.shortlist)) < 2:
      raise ValueError(
        "Expected `ExitProbes.shortlist` to hold two or more different token "
        "ids, got"
        f" {list(self.shortlist)}; make it from texts that say more"
        " (`@sources.frequent_tokens()`)."
      )

  @property
  def parts(self) -> tuple[str, ...]:
    return (
      ("exit_probes", "exit_classifier")
      if self.classifier
      else ("exit_probes",)
    )

  def loss(self, module, params, batch, rng):
    del rng  # as of the classifier
    states = applied(module, params, batch, method="states")
    hidden, _, normed = jax.lax.stop_gradient(states)
    kernel = parameters.head_kernel(params, module.config)
    listed = (
      normed[:-1].astype(jnp.float32) @ kernel[:, np.asarray(self.shortlist)]
    )
    previous = jnp.concatenate([jnp.zeros_like(hidden[:1]), hidden[:-2]])
    known = confidence.evidence(hidden[:-1], previous, layers_lib.peaks(listed))
    known = jax.lax.stop_gradient(known)
    probes = parameters.probes(params)
    assert probes is not None  # `parts`
    read = [probes.logit(i + 1, normed[i], known[i]) for i in range(len(known))]
    logits = jnp.stack([*read, jnp.full_like(read[0], confidence.CERTAIN)])
    predictions = losses.layer_predictions(normed, kernel)
    token_weights = batch["decoder_loss_weights"]
    objective = losses.classifier_loss
    loss, metrics = _stage_two(objective, logits, predictions, token_weights)
    if self.classifier:
      loss += objective(classified(params, normed), predictions, token_weights)
    return loss, metrics


def check_terms(sampled_layers: int | None, **weights: float) -> None:
  """ValueError for layers that cannot be drawn and weights of terms that are
  none.
  """
  if sampled_layers is not None:
    bounds = limits.SIZES["num_decoder_layers"]
    limits.whole(
      "sampled_layers", sampled_layers, *bounds, "draw layers, or leave it out"
    )
  for name, weight in weights.items():
    if not 0.0 <= weight < np.inf:
      raise ValueError(
        f"Expected `{name}` to be finite and at least 0, got {weight!r}."
      )


def classified(
  params: Params, normed: Float[Array, "layers batch length emb"]
) -> Float[Array, "layers batch length"]:
  """The exit classifier's logits."""
  classifier = params["decoder"]["exit_classifier"]
  return (normed.astype(jnp.float32) @ classifier["kernel"])[
    ..., 0
  ] + classifier["bias"][0]


def _stage_two(
  objective: Callable[..., jax.Array], logits, predictions, token_weights
) -> tuple[jax.Array, BatchMetrics]:
  """Loss and metrics of exit logits [layers, batch, length]."""
  loss = objective(logits, predictions, token_weights)
  weight = jnp.sum(token_weights)
  agrees = (predictions == predictions[-1:]).astype(jnp.float32)
  hits = ((logits > 0).astype(jnp.float32) == agrees).astype(jnp.float32)

  def over_tokens(x):
    return jnp.sum(x * token_weights[None], axis=(1, 2))

  apart = jax.nn.softplus(logits) - agrees * logits
  sums = losses.LayerMetrics(*map(over_tokens, (apart, hits, agrees)))
  layers = jnp.arange(len(logits))
  return loss, layer_metrics(
    len(logits), layers, loss, weight, sums, jnp.zeros(())
  )


def normed_states(module, params, batch, rng):
  """What the layers' losses read of a batch, with dropout by `rng`."""
  drawn = (
    {} if rng is None else {"enable_dropout": True, "rngs": {"dropout": rng}}
  )
  return applied(module, params, batch, method="states", **drawn)[2]


def applied(module, params, batch, **options) -> Any:
  """What the network makes of a batch."""
  return module.apply(
    {"params": params},
    batch["encoder_input_tokens"],
    batch["decoder_input_tokens"],
    batch["decoder_target_tokens"],
    batch.get("encoder_segment_ids"),
    batch.get("decoder_segment_ids"),
    **options,
  )
