"""Attention of the positions that are decoded now, one of every row, as XLA computes it."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from calm.exits.layers import KeyValue
from calm.t5.caches import Cache


@runtime_checkable
class Attends(Protocol):
  """`Attention`, or what runs one for other rows."""

  def to_past(self, query: jax.Array, row: KeyValue) -> jax.Array: ...

  def to_prompt(self, query: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Attention:
  """What one layer's attention reads, of a batch or of some of its rows.

  Attributes:
    cache: keys and values of the positions before this one; read only.
    past_bias: of those keys, [heads, length] or [batch, heads, length].
    current_bias: of the current token with itself, [heads].
    cross: keys and values of the prompts.
    cross_bias: of those keys, [batch, 1, input_length].
    float32: whether scores are float32 whatever the activation dtype.
  """

  cache: Cache
  past_bias: jax.Array
  current_bias: jax.Array
  cross: Cache
  cross_bias: jax.Array
  float32: bool

  def to_past(self, query: jax.Array, row: KeyValue) -> jax.Array:
    """Mixed values [batch, heads * head_dim] of the past and of the current token, `row`."""
    value, query, key_now = row.value, self._scored(query), self._scored(row.key)
    past = _scores(query, self._scored(self.cache.keys))
    bias = self.past_bias if self.past_bias.ndim == 3 else self.past_bias[None]
    past = past + bias.astype(past.dtype)
    now = jnp.sum(query * key_now, axis=-1, keepdims=True)
    now = now + self.current_bias[None, :, None].astype(now.dtype)
    # The current token is not in the cache yet: branches of the chain only read it.
    weights = jax.nn.softmax(jnp.concatenate([past, now], axis=-1)).astype(value.dtype)
    mixed = _mixed(weights[..., :-1], self.cache.values)
    mixed = mixed + weights[..., -1:] * value
    return mixed.reshape(mixed.shape[0], -1)

  def to_prompt(self, query: jax.Array) -> jax.Array:
    """Mixed values [batch, heads * head_dim] of the prompt."""
    scores = _scores(self._scored(query), self._scored(self.cross.keys))
    weights = jax.nn.softmax(scores + self.cross_bias.astype(scores.dtype))
    mixed = _mixed(weights.astype(query.dtype), self.cross.values)
    return mixed.reshape(mixed.shape[0], -1)

  def _scored(self, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if self.float32 else x


def _scores(query: jax.Array, keys: jax.Array) -> jax.Array:
  """[batch, heads, length] of queries [batch, heads, head_dim]."""
  if keys.ndim == 4:
    return jnp.einsum("bhd,bhld->bhl", query, keys)
  # Heads side by side: a query that is 0 at the others' numbers, so that no key is moved.
  wide = query[:, :, None] * _own_head(query)[None, :, :, None]
  return jnp.einsum("bhc,blc->bhl", wide.reshape(*query.shape[:2], -1), keys)


def _mixed(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Values mixed by weights [batch, heads, length]: [batch, heads, head_dim]."""
  if values.ndim == 4:
    return jnp.einsum("bhl,bhld->bhd", weights, values)
  every = jnp.einsum("bhl,blc->bhc", weights, values)
  every = every.reshape(*every.shape[:2], weights.shape[1], -1)
  return jnp.sum(every * _own_head(weights)[None, :, :, None], axis=2)


def _own_head(x: jax.Array) -> jax.Array:
  """1 where a head of [batch, heads, ...] meets itself, [heads, heads]."""
  return jnp.eye(x.shape[1], dtype=x.dtype)
