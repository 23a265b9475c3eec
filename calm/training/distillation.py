"""Early layers learn what the last one would write, all of its distribution and not a token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.training import losses, objectives


@dataclasses.dataclass(frozen=True)
class SelfDistilled:
  """Stage one where a promise is closeness to the full model's own text.

  NLL_L + share / (L - 1) sum_{i < L} KL(p_L || p_i): the last layer learns the targets, layers
  before it the last one's probabilities, which teach it nothing in turn. A target says one
  token of many that may follow; the last layer's probabilities say all of them, so that fewer
  steps bring an early layer to the last one's token.

  Attributes:
    share: of the layers before the last, over the last layer's 1.
    z_loss: T5X's penalty on log(Z)^2, of the last layer.
    sampled_layers: early layers drawn a step, all alike; None computes every layer's head.
  """

  share: float = 3.0
  z_loss: float = 1e-4
  sampled_layers: int | None = None

  @property
  def parts(self) -> tuple[str, ...]:
    """None: no exit part is trained."""
    return ()

  def loss(self, module, params, batch, rng):
    normed = objectives.normed_states(module, params, batch, rng)
    early = normed.shape[0] - 1
    chosen = jnp.arange(early)
    if rng is not None and self.sampled_layers is not None:
      draw = jax.random.fold_in(rng, 1)
      chosen = jax.random.choice(draw, early, (self.sampled_layers,))
    kernel = objectives.heads(params, module.config)
    targets, token_weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    last = kernel if kernel.ndim == 2 else kernel[-1:]
    loss, metrics = losses.layer_cross_entropy(
      normed[-1:], last, targets, token_weights, jnp.ones(1), self.z_loss
    )
    teacher = jax.lax.stop_gradient(_logits(normed[-1], last if last.ndim == 2 else last[0]))
    apart, entropies, hits = _divergences(
      normed[chosen],
      kernel if kernel.ndim == 2 else kernel[chosen],
      teacher,
      targets,
      token_weights,
    )
    penalty = loss - jnp.sum(metrics.cross_entropy)
    loss += self.share * jnp.mean(apart) if early else 0.0
    weight = jnp.sum(token_weights)
    layers = jnp.append(chosen, early)
    by_layer = lambda x, own: jnp.zeros(early + 1).at[layers].add(jnp.append(x, own))
    return loss, objectives.BatchMetrics(
      loss=loss,
      weight=weight,
      cross_entropy=by_layer(entropies, metrics.cross_entropy),
      correct=by_layer(hits, metrics.correct),
      layer_weight=by_layer(jnp.full(len(chosen), weight), weight),
      z_loss=penalty,
    )

  def trains(self, path):
    return not objectives.is_exit_part(path)

  def teaches_layers(self, num_layers):
    return num_layers > 1 and self.share > 0.0


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return x.astype(jnp.float32) @ kernel.astype(jnp.float32)


def _divergences(
  normed: Float[Array, "chosen batch length emb"],
  kernel: Float[Array, "emb vocab"] | Float[Array, "chosen emb vocab"],
  teacher: Float[Array, "batch length vocab"],
  targets: Int[Array, "batch length"],
  token_weights: Float[Array, "batch length"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over tokens of each layer: KL(teacher || layer), cross entropy and hits of targets."""
  wanted = jax.nn.log_softmax(teacher)

  # One layer's logits live at a time: the way back multiplies a head out again.
  @jax.checkpoint
  def one(x, head):
    found = jax.nn.log_softmax(_logits(x, head))
    apart = jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)
    label = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
    hits = (jnp.argmax(found, axis=-1) == targets).astype(jnp.float32)
    return tuple(jnp.sum(value * token_weights) for value in (apart, -label, hits))

  if kernel.ndim == 2:
    return jax.lax.map(functools.partial(one, head=kernel), normed)
  return jax.lax.map(lambda pair: one(*pair), (normed, kernel))
