"""What exits need of a decoder at one position, as callables: no network is known here."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class KeyValue:
  """One position's self-attention key and value at one layer, [batch, heads, head_dim]."""

  key: jax.Array
  value: jax.Array


@struct.dataclass
class Greedy:
  """The most likely token of every row."""

  token: jax.Array  # the argmax of the logits (the first of equals), int32, [*rows]
  log_probability: jax.Array  # of that token at temperature 1, nats, [*rows]


def greedy(logits: Float[Array, "*rows vocab"]) -> Greedy:
  """The argmax of logits and its log-probability."""
  num_tokens = logits.shape[-1]
  top = jnp.max(logits, axis=-1, keepdims=True)
  # A minimum over places runs in vector registers, where `argmax` runs element by element.
  place = jnp.where(logits == top, jnp.arange(num_tokens, dtype=jnp.int32), num_tokens - 1)
  total = jnp.sum(jnp.exp(logits - top), axis=-1)
  return Greedy(jnp.min(place, axis=-1), -jnp.log(total))


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
  exit_logit: Callable[[jax.Array], jax.Array]  # x^i -> pre-sigmoid exit confidence [batch]
  # x^i -> float32 logits [batch, shortlist] of likely tokens only.
  shortlist_logits: Callable[[jax.Array], jax.Array]
  # (i, x^i, d^i, d^{i-1}) -> pre-sigmoid confidence [batch] of layer i's own probe.
  probe_logit: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
  # (j, d^j) -> what learned propagation keeps of a token that leaves after layer j besides
  # d^j, [batch, width]; zeros for layers that have no map.
  code: Callable[[int, jax.Array], jax.Array]
  # (k, [d^j; code]) -> the predicted input of the skipped layer k, [batch, emb_dim].
  predict: Callable[[int, jax.Array], jax.Array]
  # (i, d^i) -> x^i, what heads and confidences read of it, [batch, emb_dim]: the normed
  # state, through layer i's translator where it has one.
  read: Callable[[int, jax.Array], jax.Array] = lambda layer, hidden: hidden
  translated: tuple[int, ...] = ()  # layers that have a translator
  # x^i -> what the argmax of these logits is, where the head knows without all of them;
  # None: ask the logits.
  greedy: Callable[[jax.Array], Greedy | None] = lambda read: None


def select_rows(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
  """`jnp.where` over the leading row axis of every leaf."""

  def pick(a, b):
    return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(pick, if_true, if_false)
