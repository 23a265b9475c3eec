"""Training losses, Eq. 6 and the exit classifier's, of decoder_norm(d^i),
[layers, batch, length, emb_dim], and the head's kernel; one layer's logits live
at a time, and padding weighs 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


class LayerMetrics(NamedTuple):
  """Per-layer sums over real tokens (divide by the summed weights for
  means).
  """

  cross_entropy: Float[Array, " layers"]  # negative log-likelihood in nats
  correct: Float[Array, " layers"]  # argmaxes that equal the target
  # argmaxes that equal the last of these layers'
  agreement: Float[Array, " layers"]


def layer_weights(num_layers: int) -> np.ndarray:
  """Eq. 6's weights, w_i = i / sum_j j for layers i = 1 ... num_layers; they
  sum to 1.
  """
  weights = np.arange(1, num_layers + 1, dtype=np.float32)
  return weights / weights.sum()


def equal_weights(num_layers: int) -> np.ndarray:
  """All layers alike, w_i = 1 / num_layers: early ones count for more than in
  Eq. 6.
  """
  return np.full(num_layers, 1.0 / num_layers, np.float32)


def last_layer_weights(num_layers: int) -> np.ndarray:
  """All weight on the last layer: ordinary training, for comparison with Eq.
  6.
  """
  return np.eye(num_layers, dtype=np.float32)[-1]


# Any: type checkers lose the function's type in `partial`.
_differentiable: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(5,))


@_differentiable
def layer_cross_entropy(
  normed: Float[Array, "layers batch length emb"],
  kernel: Float[Array, "emb vocab"],
  targets: Int[Array, "batch length"],
  token_weights: Float[Array, "batch length"],
  weights: Float[Array, " layers"],
  z_loss: float = 0.0,
) -> tuple[Float[Array, ""], LayerMetrics]:
  """Sum over tokens of sum_i w_i * (NLL_i + z_loss * log(Z_i)^2) (Eq. 6).

  The forward pass computes the gradients while a layer's logits are at hand, so
  that no [layers, batch, length, vocab] array ever exists and no head is
  multiplied out twice.

  `weights` are w_i. The loss is a sum, not a mean; the metrics carry no
  gradient.
  """
  return _forward(normed, kernel, targets, token_weights, weights, z_loss)[0]


def _forward(normed, kernel, targets, token_weights, weights, z_loss):
  """(loss, metrics), gradients; XLA leaves the gradients out where nothing
  reads them.
  """
  flat = normed.reshape(len(normed), -1, normed.shape[-1])
  targets, token_weights = targets.reshape(-1), token_weights.reshape(-1)
  kernel = kernel.astype(jnp.float32)

  def one_layer(carry, inputs):
    loss, kernel_grad = carry
    x, weight = inputs
    logits = x.astype(jnp.float32) @ kernel
    log_z = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    cross_entropy = jnp.sum((log_z - label) * token_weights)
    layer_loss = cross_entropy + z_loss * jnp.sum(
      jnp.square(log_z) * token_weights
    )
    probabilities = jnp.exp(logits - log_z[:, None])
    is_label = jnp.arange(logits.shape[-1])[None, :] == targets[:, None]
    grad = probabilities * (1.0 + 2.0 * z_loss * log_z)[
      :, None
    ] - is_label.astype(jnp.float32)
    grad = grad * token_weights[:, None] * weight
    kernel_grad = kernel_grad + x.astype(jnp.float32).T @ grad
    made = (
      cross_entropy,
      jnp.argmax(logits, axis=-1),
      (grad @ kernel.T).astype(x.dtype),
    )
    return (loss + weight * layer_loss, kernel_grad), made

  start = jnp.zeros(()), jnp.zeros_like(kernel)
  (loss, kernel_grad), (cross_entropy, best, x_grads) = lax.scan(
    one_layer, start, (flat, weights.astype(jnp.float32))
  )

  def counted(hits):
    return jnp.sum(jnp.where(hits, token_weights, 0.0), axis=-1)

  correct = counted(best == targets[None])
  agreement = counted(best == best[-1:])
  metrics = LayerMetrics(cross_entropy, correct, agreement)
  return (loss, metrics), (x_grads.reshape(normed.shape), kernel_grad)


def _backward(z_loss, gradients, cotangents):
  del z_loss
  loss_cotangent, _ = cotangents
  normed_grad, kernel_grad = gradients
  # A gradient has its input's dtype, bfloat16 where activations are.
  scaled = normed_grad.astype(jnp.float32) * loss_cotangent
  return (
    scaled.astype(normed_grad.dtype),
    kernel_grad * loss_cotangent,
    None,
    None,
    None,
  )


layer_cross_entropy.defvjp(_forward, _backward)


def layer_predictions(
  normed: Float[Array, "layers batch length emb"],
  kernel: Float[Array, "emb vocab"],
) -> Int[Array, "layers batch length"]:
  """Every layer's argmax token, one layer's logits at a time."""
  return lax.map(
    lambda x: jnp.argmax(x.astype(jnp.float32) @ kernel, axis=-1), normed
  )


def classifier_loss(
  exit_logits: Float[Array, "layers batch length"],
  predictions: Int[Array, "layers batch length"],
  token_weights: Float[Array, "batch length"],
) -> Float[Array, ""]:
  """Binary cross entropy against agreement with the last layer (paper section
  3.5).

  1 / (L - 1) sum_{i < L} sum_t BCE(sigmoid(exit_logits[i, t]), 1[argmax_i =
  argmax_L]), summed over real tokens.
  """
  agrees = (predictions[:-1] == predictions[-1:]).astype(jnp.float32)
  logits = exit_logits[:-1]
  losses = jax.nn.softplus(logits) - agrees * logits
  return jnp.sum(losses * token_weights[None]) / losses.shape[0]


def geometric_classifier_loss(
  exit_logits: Float[Array, "layers batch length"],
  predictions: Int[Array, "layers batch length"],
  token_weights: Float[Array, "batch length"],
) -> Float[Array, ""]:
  """The geometric-like objective of Elbayad et al. (2020), the paper's App. D
  baseline.

  With q_i = sigmoid(exit_logits[i]) the probability to exit at layer i given
  that it was reached, the exit layer is distributed as q_i prod_{j < i} (1 -
  q_j), the last layer taking the rest; the loss is its cross entropy with the
  oracle's exit, the first layer whose argmax is the last layer's. Summed over
  real tokens.
  """
  agrees = predictions == predictions[-1:]
  # the last layer agrees with itself: always found
  oracle = jnp.argmax(agrees, axis=0)
  log_exit = jax.nn.log_sigmoid(exit_logits[:-1])
  log_stay = jax.nn.log_sigmoid(-exit_logits[:-1])
  nothing = jnp.zeros_like(exit_logits[:1])
  reached = jnp.concatenate([nothing, jnp.cumsum(log_stay, axis=0)])
  log_distribution = reached + jnp.concatenate([log_exit, nothing])
  log_likelihood = jnp.take_along_axis(log_distribution, oracle[None], axis=0)[
    0
  ]
  return -jnp.sum(log_likelihood * token_weights)
