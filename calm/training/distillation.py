"""Early layers, or exits beside them, learn what the last layer would write,
all of its distribution and not a token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from calm import arguments
from calm.t5 import network, parameters
from calm.training import losses, objectives


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class SelfDistilled(objectives.Objective):
  """Stage one where a promise is closeness to the full model's own text.

  NLL_L + share / (L - 1) sum_{i < L} KL(p_L || p_i): the last layer learns the
  targets, layers before it the last one's probabilities, which teach it nothing
  in turn.

  Attributes:
    share: of the layers before the last, over the last layer's 1.
    z_loss: T5X's penalty on log(Z)^2, of the last layer.
    sampled_layers: early layers drawn a step, all alike; None computes every
      layer's head.
  """

  share: float = 3.0
  z_loss: float = 1e-4
  sampled_layers: int | None = None

  def __post_init__(self):
    objectives.check_terms(
      self.sampled_layers, z_loss=self.z_loss, share=self.share
    )

  def loss(self, module, params, batch, rng):
    normed = objectives.normed_states(module, params, batch, rng)
    early = normed.shape[0] - 1
    chosen = jnp.arange(early)
    if rng is not None and self.sampled_layers is not None:
      chosen = jax.random.choice(
        jax.random.fold_in(rng, 1), early, (self.sampled_layers,)
      )
    kernel = parameters.head_kernel(params, module.config)
    targets = batch["decoder_target_tokens"]
    token_weights = batch["decoder_loss_weights"]
    loss, metrics = losses.layer_cross_entropy(
      normed[-1:], kernel, targets, token_weights, jnp.ones(1), self.z_loss
    )
    teacher = jax.lax.stop_gradient(_logits(normed[-1], kernel))
    apart, early_sums = _divergences(
      normed[chosen], kernel, teacher, targets, token_weights
    )
    penalty = loss - jnp.sum(metrics.cross_entropy)
    loss += self.share * jnp.mean(apart) if early else 0.0
    sums = losses.LayerMetrics(*map(jnp.append, early_sums, metrics))
    layers = jnp.append(chosen, early)
    weight = jnp.sum(token_weights)
    return loss, objectives.layer_metrics(
      early + 1, layers, loss, weight, sums, penalty
    )

  def teaches_layers(self, num_layers):
    return num_layers > 1 and self.share > 0.0


@arguments.checked()
@dataclasses.dataclass(frozen=True)
class ExitMaps(objectives.Objective):
  """Exits beside a frozen model, on any texts: what `calm fit` fits, by
  gradients alone.

  With x = decoder_norm(d^j) at exit layer j, the sum over tokens of

    mean_j -sum_v p_v log q_v,                              q = softmax(head(x +
    x A_j + b_j)) + mean_{j, k > j + 1} |d^j + [x; 1] D_j U_jk - d^{k-1}|^2 /
    mean |d^{k-1}|^2 + the exit classifier's loss on x + x A_j + b_j,

  p being the full model's probabilities. The configuration says the layers
  (`T5Config.exit_translators`, `exit_propagation`). Metrics of these layers,
  and of the last, are the first term and the argmaxes that are the full
  model's.
  """

  parts = ("exit_classifier",)

  def loss(self, module, params, batch, rng):
    del rng  # as they are in inference: no dropout
    config = module.config
    if not config.exit_translators:
      raise ValueError(
        "Expected `exit_translators` in the configuration that ExitMaps "
        "trains, got no layers;"
        " name them (EXIT_LAYERS of configs/runs/exit_maps.gin)."
      )
    base, beside = (
      parameters.flatten(tree) for tree in parameters.split(params)
    )
    params = parameters.unflatten(jax.lax.stop_gradient(base) | beside)
    states = objectives.applied(module, params, batch, method="states")
    hidden, normed, read = (x.astype(jnp.float32) for x in states)
    kernel = parameters.head_kernel(params, config)
    weights = batch["decoder_loss_weights"]
    chosen = np.asarray(config.exit_translators) - 1
    teacher = _logits(read[-1], kernel)
    best = jnp.argmax(teacher, axis=-1)
    apart, sums = _divergences(read[chosen], kernel, teacher, best, weights)
    wanted = jax.nn.log_softmax(teacher)
    entropy = -jnp.sum(jnp.exp(wanted) * wanted * weights[..., None])
    stays = jax.lax.stop_gradient(read)
    predictions = losses.layer_predictions(stays, kernel)
    loss = jnp.mean(apart) + entropy
    loss += _propagation_loss(params, config, hidden, normed, weights)
    loss += losses.classifier_loss(
      objectives.classified(params, stays), predictions, weights
    )
    count = jnp.sum(weights)
    last = len(read) - 1
    said = jnp.append(sums.agreement, count)
    sums = losses.LayerMetrics(jnp.append(apart + entropy, entropy), said, said)
    layers = jnp.append(chosen, last)
    return loss, objectives.layer_metrics(
      last + 1, layers, loss, count, sums, jnp.zeros(())
    )

  def trains(self, path):
    return bool(
      {"exit_translators", "exit_propagation", *self.parts} & set(path)
    )

  def teaches_layers(self, num_layers):
    return True

  def measured_layers(self, config):
    return (*config.exit_translators, config.num_decoder_layers)


def _propagation_loss(
  params, config: network.T5Config, hidden, normed, weights
) -> jax.Array:
  """Sum over tokens of the relative squared errors of skipped layers' inputs,
  their mean over (exit layer, skipped layer); 0 without learned propagation.
  """

  def over_tokens(x):
    return jnp.sum(jnp.square(x) * weights[None, ..., None], axis=(1, 2, 3))

  errors = []
  for layer in config.exit_propagation:
    later = hidden[layer:-1]  # of the next layer the input is d^j itself
    part = params["decoder"]["exit_propagation"][f"layers_{layer - 1}"]
    bias = part["down"]["bias"][None, None]
    code = normed[layer - 1] @ part["down"]["kernel"] + bias
    moved = jnp.einsum("btr,kre->kbte", code, part["up"]["kernel"][1:])
    error = over_tokens(hidden[layer - 1][None] + moved - later)
    errors.append(error / jnp.maximum(over_tokens(later), 1e-30))
  errors = jnp.concatenate([jnp.zeros(0), *errors])
  return jnp.sum(weights) * jnp.sum(errors) / max(1, errors.size)


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return x.astype(jnp.float32) @ kernel.astype(jnp.float32)


def _divergences(
  normed: Float[Array, "chosen batch length emb"],
  kernel: Float[Array, "emb vocab"],
  teacher: Float[Array, "batch length vocab"],
  targets: Int[Array, "batch length"],
  token_weights: Float[Array, "batch length"],
) -> tuple[jax.Array, losses.LayerMetrics]:
  """Sums over tokens of each layer: KL(teacher || layer), and its metrics."""
  wanted = jax.nn.log_softmax(teacher)
  best = jnp.argmax(teacher, axis=-1)

  # One layer's logits live at a time: the way back multiplies a head out again.
  @jax.checkpoint
  def one(x, kernel):
    found = jax.nn.log_softmax(_logits(x, kernel))
    apart = jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)
    label = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
    said = jnp.argmax(found, axis=-1)
    terms = (apart * token_weights, -label * token_weights)
    counts = (jnp.where(said == x, token_weights, 0.0) for x in (targets, best))
    return tuple(map(jnp.sum, (*terms, *counts)))

  apart, *sums = jax.lax.map(functools.partial(one, kernel=kernel), normed)
  return apart, losses.LayerMetrics(*sums)
