"""Ways of running the decode loop's steps, and the plain one; all of them decode the same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from calm import exits
from calm.exits import layers
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import decoder_weights, network, platforms

# Rows whose embeddings are picked one by one.
_FEW_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Task:
  """What is decoded."""

  config: network.T5Config  # the model's sizes
  rule: exits.Rule  # how a token goes through the layers
  weights: decoder_weights.DecoderWeights  # of learned propagation what the rule reads
  encoded: caches_lib.Encoded  # the prompts
  threshold: jax.Array  # lambda, [] or [batch]
  length: int  # positions in the caches
  # Positions of each row that are decoded already and that nothing may write over, [batch].
  kept: jax.Array | None = None
  # Whether attention, products and heads may be functions of this process (`t5.kernels`): not
  # in programs that are exported or that a compiler splits over devices.
  native: bool = False

  def __post_init__(self):
    # Once a program, not once a step: a step's codes are as wide as the exits that it may take.
    read = self.weights.for_exits(self.rule, self.config.num_decoder_layers)
    object.__setattr__(self, "weights", read)

  @property
  def batch_size(self) -> int:
    return self.encoded.bias.shape[0]

  def embed(self, tokens: jax.Array) -> jax.Array:
    """What the first layer gets, [batch, emb_dim], in the activation dtype."""
    table = self.weights.embedding
    # XLA:CPU gives half of a gather from a large matrix to another thread, and to wake it takes
    # longer than to copy a few rows.
    if self.native and platforms.is_cpu() and len(tokens) <= _FEW_ROWS:
      rows = [lax.dynamic_slice_in_dim(table, token, 1) for token in tokens]
      return jnp.concatenate(rows).astype(self.config.dtype)
    return table[tokens].astype(self.config.dtype)

  def keeps(self, position: jax.Array) -> jax.Array | None:
    """The rows that are decoded already at `position`, [batch] bool."""
    return None if self.kept is None else position < self.kept

  def empty_caches(self) -> tuple[caches_lib.Cache, ...]:
    depth = self.rule.depth(self.config.num_decoder_layers)
    return caches_lib.empty_caches(self.config, self.batch_size, self.length, depth)


class Eager:
  """The plain engine, and the one for any rule: skipped layers are filled at every token."""

  def __init__(self, task: Task):
    self.task = task
    self.table = attention_lib.bias_table(task.weights, task.config, task.length)

  @property
  def empty(self) -> Any:
    """What the loop carries before the first token."""
    return self.task.empty_caches()

  def take_step(self, current, position, active, cache) -> tuple[exits.TokenExit, Any]:
    """The loop's step."""
    task, rule = self.task, self.task.rule
    assert not isinstance(rule, exits.Speculative)  # which runs no step
    decoder, hidden = self.decoder(position), task.embed(current)
    made = rule(decoder.layers(cache), hidden, active, task.threshold, position)
    keeps = task.keeps(position)
    ends = after_each(position, made.rows, made.head)
    return made, caches_lib.write_rows(cache, made.rows, ends, keeps)

  def resume(self, caches: tuple[caches_lib.Cache, ...], position: jax.Array) -> Any:
    """What the loop carries to go on from `position`, from every layer's cache."""
    return caches

  def flush(self, cache: Any, position: jax.Array) -> tuple[caches_lib.Cache, ...]:
    """Every layer's cache, filled up to `position`, from what the loop carries."""
    return cache

  def grow(self, cache: Any) -> Any:
    """What a loop of a shorter task carries, with this one's room."""
    return grown(cache, self.task.length)

  def decoder(self, position: jax.Array) -> decoder_lib.DecoderStep:
    task, bias = self.task, self.table.at(position)
    return decoder_lib.DecoderStep(
      task.weights, task.config, task.encoded, bias, self.table.current, task.native
    )


def grown(caches: tuple[caches_lib.Cache, ...], length: int) -> tuple[caches_lib.Cache, ...]:
  """Caches of so many positions; what lies beyond those that there were is 0."""
  return jax.tree.map(lambda x: grown_array(x, length, axis=x.ndim - 2), caches)


def grown_array(array: jax.Array, length: int, axis: int) -> jax.Array:
  """An array with zeros behind, `length` along an axis."""
  missing = [(0, 0)] * array.ndim
  missing[axis] = (0, length - array.shape[axis])
  return jnp.pad(array, missing)


def after(position: jax.Array, made: jax.Array) -> jax.Array:
  """`position`, in a form that XLA can know only once it has `made` (any float array).

  XLA:CPU begins what has its inputs: a cache that is written before it is read would be copied
  whole, and of ten small operations that are ready at once half go to another thread, which
  takes longer to wake. (It drops `lax.optimization_barrier` before it decides on copies.)"""
  bits = lax.bitcast_convert_type(made.reshape(-1)[0].astype(jnp.float32), jnp.int32)
  # Without its lowest bit and shifted, it is never negative, whatever the float is: adds 0.
  return position + jnp.minimum(lax.shift_right_logical(bits, 1), 0)


def after_each(
  position: jax.Array, rows: Sequence[layers.KeyValue], last: jax.Array
) -> list[jax.Array]:
  """`position` for every layer's cache, known once that has been read: writes become ready
  layer by layer. Elsewhere than on a CPU they wait for what the last layer's state led to, as a
  mesh would send one number more a layer."""
  end = after(position, last)
  if not platforms.is_cpu():
    return [end] * len(rows)
  return [*(after(position, row.key) for row in rows[1:]), end]
