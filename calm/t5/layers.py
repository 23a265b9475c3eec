"""T5 1.1 building blocks (Flax linen) of `network.Transformer`, with the names,
axes and two-dimensional kernels of T5X's own network, so that its checkpoints
restore unchanged.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning
from jaxtyping import Array, Float, Int

from calm.t5.limits import T5Config

Dtype = Any
Initializer = Callable[..., Any]

# Added to attention logits where attending is forbidden; finite, so that a row
# with nothing to attend to yields a uniform distribution rather than NaN (as in
# T5X).
MASK_BIAS = -1e10

kernel_init = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal"
)
attention_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
relpos_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


class Dense(nn.Module):
  """A linear map without bias, `inputs @ kernel`, computed in `dtype` of a
  float32 kernel.

  `axes` are the logical names of the kernel's two dimensions.
  """

  features: int
  axes: tuple[str, str]
  dtype: Dtype = jnp.float32
  init: Initializer = kernel_init

  @nn.compact
  def __call__(
    self, inputs: Float[Array, "*batch in"]
  ) -> Float[Array, "*batch out"]:
    kernel = partitioning.param_with_axes(
      "kernel",
      self.init,
      (inputs.shape[-1], self.features),
      jnp.float32,
      axes=self.axes,
    )
    return jnp.asarray(inputs, self.dtype) @ jnp.asarray(kernel, self.dtype)


class LayerNorm(nn.Module):
  """T5 layer norm: `x / sqrt(mean(x^2) + 1e-6) * scale`, no mean subtracted, no
  bias.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch emb"]
  ) -> Float[Array, "*batch emb"]:
    scale = partitioning.param_with_axes(
      "scale",
      nn.initializers.ones,
      (x.shape[-1],),
      jnp.float32,
      axes=("embed",),
    )
    x = jnp.asarray(x, jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6
    )
    scale = jnp.asarray(scale, self.dtype).reshape(
      (1,) * (x.ndim - 1) + scale.shape
    )
    return jnp.asarray(x, self.dtype) * scale


class Embed(nn.Module):
  """Token embeddings, and their transpose as an output head where the head is
  tied.
  """

  config: T5Config

  def setup(self):
    self.embedding = partitioning.param_with_axes(
      "embedding",
      nn.initializers.normal(stddev=1.0),
      (self.config.vocab_size, self.config.emb_dim),
      jnp.float32,
      axes=("vocab", "embed"),
    )

  def __call__(
    self, tokens: Int[Array, "*batch"]
  ) -> Float[Array, "*batch emb"]:
    """Embeds tokens; a one-hot product partitions over devices, a gather is
    fast on one.
    """
    cfg = self.config
    if cfg.one_hot_embedding:
      table = jnp.asarray(self.embedding, cfg.dtype)
      return jax.nn.one_hot(tokens, cfg.vocab_size, dtype=cfg.dtype) @ table
    embedded = jnp.asarray(jnp.asarray(self.embedding)[tokens], cfg.dtype)
    return partitioning.with_sharding_constraint(
      embedded, ("batch", "length", "embed")
    )

  def attend(
    self, x: Float[Array, "*batch emb"]
  ) -> Float[Array, "*batch vocab"]:
    """float32 logits of the tied head, before their scaling by 1 /
    sqrt(emb_dim).
    """
    return (
      jnp.asarray(x, jnp.float32) @ jnp.asarray(self.embedding, jnp.float32).T
    )


class Mlp(nn.Module):
  """Feed-forward block: one projection an activation, multiplied, then
  projected back.
  """

  config: T5Config

  @nn.compact
  def __call__(
    self, inputs: Float[Array, "batch length emb"], *, deterministic: bool
  ):
    cfg = self.config
    parts = []
    for index, activation in enumerate(cfg.mlp_activations):
      name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{index}"
      x = Dense(cfg.mlp_dim, ("embed", "mlp"), cfg.dtype, name=name)(inputs)
      parts.append(activation_fn(activation)(x))
    hidden = functools.reduce(jnp.multiply, parts)
    drop = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    hidden = drop(hidden, deterministic=deterministic)
    hidden = partitioning.with_sharding_constraint(
      hidden, ("batch", "length", "mlp")
    )
    return Dense(inputs.shape[-1], ("mlp", "embed"), cfg.dtype, name="wo")(
      hidden
    )


def activation_fn(name: str) -> Callable[[jax.Array], jax.Array]:
  """`linear`, or any activation of `flax.linen` by name (`gelu` is the tanh
  form).
  """
  return (lambda x: x) if name == "linear" else getattr(nn, name)


class Attention(nn.Module):
  """T5 multi-head attention: no scaling by 1 / sqrt(head_dim), which the init
  absorbs.
  """

  config: T5Config

  @nn.compact
  def __call__(
    self,
    inputs_q: Float[Array, "batch query_length emb"],
    inputs_kv: Float[Array, "batch key_length emb"],
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    deterministic: bool,
  ) -> Float[Array, "batch query_length emb"]:
    def query_init(*args):
      return attention_init(*args) / np.sqrt(self.config.head_dim)

    query = self._project("query", inputs_q, query_init)
    key = self._project("key", inputs_kv, attention_init)
    value = self._project("value", inputs_kv, attention_init)
    mixed = self.mix(query, key, value, mask, bias, deterministic)
    mixed = mixed.reshape(*mixed.shape[:2], -1)
    width = inputs_q.shape[-1]
    axes = ("joined_kv", "embed")
    return Dense(width, axes, self.config.dtype, attention_init, name="out")(
      mixed
    )

  def _project(self, name: str, x: jax.Array, init: Initializer) -> jax.Array:
    heads = self.config.num_heads
    head_dim = self.config.head_dim
    x = Dense(
      heads * head_dim,
      ("embed", "joined_kv"),
      self.config.dtype,
      init,
      name=name,
    )(x)
    x = x.reshape(*x.shape[:-1], heads, head_dim)
    return partitioning.with_sharding_constraint(
      x, ("batch", "length", "heads", "kv")
    )

  def mix(self, query, key, value, mask, bias, deterministic) -> jax.Array:
    """Values by their weights, [batch, query_length, heads, head_dim]."""
    cfg = self.config
    if cfg.float32_attention_logits:
      query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    if mask is not None:
      mask_bias = jnp.where(mask.astype(bool), 0.0, MASK_BIAS).astype(cfg.dtype)
      bias = mask_bias if bias is None else mask_bias + bias
    if bias is not None:
      logits = logits + bias.astype(logits.dtype)
    weights = jax.nn.softmax(logits).astype(cfg.dtype)
    drop = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
    return jnp.einsum(
      "bhqk,bkhd->bqhd", drop(weights, deterministic=deterministic), value
    )


class RelativePositionBiases(nn.Module):
  """Learned attention bias per head and bucket of relative position, shared by
  a stack.
  """

  config: T5Config

  @nn.compact
  def __call__(
    self, query_length: int, key_length: int, bidirectional: bool
  ) -> jax.Array:
    """Returns biases [1, heads, query_length, key_length]."""
    cfg = self.config
    embedding = partitioning.param_with_axes(
      "rel_embedding",
      relpos_init,
      (cfg.num_heads, cfg.relpos_buckets),
      jnp.float32,
      axes=("heads", "relpos_buckets"),
    )
    # One number a distance, then laid out: a one-hot of all pairs of positions
    # is 134 MB of constant at length 1024. A product, since its gradient is one
    # too, not a scatter.
    distances = np.arange(1 - query_length, key_length)
    buckets = relative_position_buckets(
      distances, bidirectional, cfg.relpos_buckets, cfg.relpos_max_distance
    )
    one_hot = jax.nn.one_hot(
      buckets, cfg.relpos_buckets, dtype=jnp.float32, axis=0
    )
    # Rounded last: gradients add up in float32.
    by_distance = jnp.asarray(embedding, jnp.float32) @ one_hot
    biases = by_position(by_distance, query_length, key_length)
    return jnp.asarray(biases[None], cfg.dtype)


def by_position(
  by_distance: Float[Array, "heads distances"],
  query_length: int,
  key_length: int,
) -> Float[Array, "heads query_length key_length"]:
  """Lays out `by_distance[:, key - query + query_length - 1]`, without a
  gather.

  Repeats of a row of n numbers, cut into rows of n - 1, begin one number later
  in each row.
  """
  repeated = jnp.pad(by_distance, [(0, 0), (0, 1)])
  heads, width = repeated.shape
  repeated = jnp.tile(repeated, (1, query_length))[
    :, : query_length * (width - 1)
  ]
  shifted = repeated.reshape(heads, query_length, width - 1)
  return shifted[:, :, query_length - 1 :]


def relative_position_buckets(
  relative_position: np.ndarray,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> np.ndarray:
  """Buckets of `key position - query position`: half of them (of each
  direction, where `bidirectional`; else keys ahead share bucket 0) hold one
  distance each, the others grow geometrically up to `max_distance`, beyond
  which all share the last (Raffel et al. 2020, 2.1).
  """
  distance = -relative_position
  offset = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = np.where(distance < 0, num_buckets, 0)
    distance = np.abs(distance)
  else:
    distance = np.maximum(distance, 0)
  num_exact = num_buckets // 2
  epsilon = np.finfo(np.float32).eps
  log_ratio = np.log(distance.astype(np.float32) / num_exact + epsilon)
  log_ratio = log_ratio / np.log(max_distance / num_exact)
  far = num_exact + (log_ratio * (num_buckets - num_exact)).astype(np.int32)
  far = np.minimum(far, num_buckets - 1)
  return (offset + np.where(distance < num_exact, distance, far)).astype(
    np.int32
  )
