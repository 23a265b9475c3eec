"""What exits need of a decoder at one position, as callables: no network is
known here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class KeyValue:
  """One position's self-attention key and value at one layer, [batch, heads,
  head_dim].
  """

  key: jax.Array
  value: jax.Array


@struct.dataclass
class Greedy:
  """The most likely token of every row."""

  # the argmax of the logits (the first of equals), int32, [*rows]
  token: jax.Array
  log_probability: jax.Array  # of that token at temperature 1, nats, [*rows]


@struct.dataclass
class Peaks:
  """What measures and greedy decoding ask of rows of n logits l, [*rows]; t is
  the largest, and those of minus infinity are none of the n.
  """

  token: jax.Array  # the argmax, the first of equals, int32
  top: jax.Array  # t
  second: jax.Array  # the second largest; t where two are as large
  total: jax.Array  # sum e^(l - t)
  weighted: jax.Array  # sum e^(l - t) (l - t)
  count: jax.Array  # n, float32

  @property
  def greedy(self) -> Greedy:
    return Greedy(self.token, -jnp.log(self.total))

  @property
  def margin(self) -> jax.Array:
    """p1 - p2, the gap of the two largest softmax probabilities (paper section
    3.5).

    Exactly 1.0 in float32 once the logit gap passes about 17: a threshold of 1
    is not "never".
    """
    return (1.0 - jnp.exp(self.second - self.top)) / self.total

  @property
  def certainty(self) -> jax.Array:
    """1 - H(p) / log n: the entropy of the softmax, 0 of a uniform one."""
    entropy = jnp.log(self.total) - self.weighted / self.total
    return jnp.clip(
      1.0 - entropy / jnp.maximum(jnp.log(self.count), 1e-6), 0.0, 1.0
    )


def peaks(logits: Float[Array, "*rows vocab"]) -> Peaks:
  """`Peaks` of logits, in float32."""
  logits, num_tokens = logits.astype(jnp.float32), logits.shape[-1]
  top = jnp.max(logits, axis=-1, keepdims=True)
  # A minimum over places runs in vector registers, where `argmax` runs element
  # by element.
  place = jnp.where(
    logits == top, jnp.arange(num_tokens, dtype=jnp.int32), num_tokens - 1
  )
  second = jnp.max(jnp.where(logits < top, logits, -jnp.inf), axis=-1)
  is_tied = jnp.sum((logits == top).astype(jnp.int32), axis=-1) > 1
  below = logits - top
  weights = jnp.exp(below)
  # 0 log 0 = 0, where the product would be NaN.
  weighted = weights * jnp.maximum(below, -1e4)
  return Peaks(
    token=jnp.min(place, axis=-1),
    top=top[..., 0],
    second=jnp.where(is_tied, top[..., 0], second),
    total=jnp.sum(weights, axis=-1),
    weighted=jnp.sum(weighted, axis=-1),
    count=jnp.sum((logits > -jnp.inf).astype(jnp.float32), axis=-1),
  )


@dataclasses.dataclass(frozen=True)
class Layers:
  """What exits need of a decoder at one position; layers are 1-based."""

  num_layers: int  # L
  # (i, d^{i-1}) -> (d^i, this position's `KeyValue` at layer i).
  run: Callable[[int, jax.Array], tuple[jax.Array, KeyValue]]
  # (i, d) -> `KeyValue` that layer i makes of input state d.
  project: Callable[[int, jax.Array], KeyValue]
  # x^i -> float32 logits [batch, vocab] of the full head.
  logits: Callable[[jax.Array], jax.Array]
  # x^i -> pre-sigmoid exit confidence [batch]
  exit_logit: Callable[[jax.Array], jax.Array]
  # x^i -> float32 logits [batch, shortlist] of likely tokens only.
  shortlist_logits: Callable[[jax.Array], jax.Array]
  # (i, x^i, d^i, d^{i-1}) -> pre-sigmoid confidence [batch] of layer i's own
  # probe.
  probe_logit: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
  # (j, d^j) -> what learned propagation keeps of a token that leaves after
  # layer j besides d^j, [batch, width]; zeros for layers that have no map.
  code: Callable[[int, jax.Array], jax.Array]
  # (k, [d^j; code]) -> the predicted input of the skipped layer k, [batch,
  # emb_dim].
  predict: Callable[[int, jax.Array], jax.Array]
  # (i, d^i) -> x^i, what heads and confidences read of it, [batch, emb_dim]:
  # the normed state, through layer i's translator where it has one.
  read: Callable[[int, jax.Array], jax.Array] = lambda layer, hidden: hidden
  translated: tuple[int, ...] = ()  # layers that have a translator
  peaks: Callable[[jax.Array], Peaks] = peaks  # of logits


def select_rows(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
  """`jnp.where` over the leading row axis of every leaf."""

  def pick(a, b):
    return jnp.where(
      condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b
    )

  return jax.tree.map(pick, if_true, if_false)
