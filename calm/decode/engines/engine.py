"""Ways of running the decode loop's steps, and the plain one; all of them decode the same.

Bound to a `Task`, an engine offers the loop's step and what the loop carries.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from calm import exits
from calm.decode import loop
from calm.exits import layers
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import decoder_weights, network, platforms

# Rows whose embeddings are picked one by one.
_FEW_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Task:
  """What is decoded.

  Attributes:
    config: the model's sizes.
    rule: how a token goes through the layers.
    weights: the decoder; of its learned propagation what the rule reads.
    encoded: the prompts.
    threshold: lambda, [] or [batch].
    length: positions in the caches.
    kept: positions of each row that are decoded already and that nothing may write over,
      [batch]; None: none.
    starts: position of each row's first token, [batch], where rows do not begin together
      (`refill`); None: 0.
    native: whether attention, products and heads may be functions of this process, where these
      are faster (`t5.kernels`): not in programs that are exported or that a compiler
      splits over devices.
  """

  config: network.T5Config
  rule: exits.Rule
  weights: decoder_weights.DecoderWeights
  encoded: caches_lib.Encoded
  threshold: jax.Array
  length: int
  kept: jax.Array | None = None
  starts: jax.Array | None = None
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
    return self._rows_of_embedding(tokens).astype(self.config.dtype)

  def _rows_of_embedding(self, tokens: jax.Array) -> jax.Array:
    """[batch, emb_dim]. XLA:CPU gives half of a gather from a large matrix to another thread,
    and to wake it takes longer than to copy a few rows."""
    table = self.weights.embedding
    if not self.native or not platforms.wakes_threads() or len(tokens) > _FEW_ROWS:
      return table[tokens]
    return jnp.concatenate([lax.dynamic_slice_in_dim(table, token, 1) for token in tokens])

  def keeps(self, position: jax.Array) -> jax.Array | None:
    """The rows that are decoded already at `position`, [batch] bool."""
    return None if self.kept is None else position < self.kept

  def generated(self, position: jax.Array) -> jax.Array:
    """Tokens that each row has generated before `position`, [] or [batch]."""
    return position if self.starts is None else position - self.starts

  def empty_caches(self) -> tuple[caches_lib.Cache, ...]:
    depth = self.rule.depth(self.config.num_decoder_layers)
    return caches_lib.empty_caches(self.config, self.batch_size, self.length, depth)


@dataclasses.dataclass(frozen=True)
class Bound:
  """An engine at work.

  Attributes:
    empty: what the loop carries before the first token.
    take_step: the loop's step.
    resume: (every layer's cache, position) -> what the loop carries to go on from there.
    flush: (what the loop carries, position) -> every layer's cache, filled up to `position`.
    shift: (what the loop carries, by) -> the same, position `by` now the first.
    grow: what a loop of a shorter task carries -> the same, with this task's room.
  """

  empty: Any
  take_step: loop.Step
  resume: Callable[[tuple[caches_lib.Cache, ...], jax.Array], Any]
  flush: Callable[[Any, jax.Array], tuple[caches_lib.Cache, ...]]
  shift: Callable[[Any, jax.Array], Any]
  grow: Callable[[Any], Any]


@runtime_checkable
class Engine(Protocol):
  """`Eager`, `Deferred`, `Compacted` or another."""

  def __call__(self, task: Task) -> Bound:
    """Binds the engine to a task."""
    ...


def shifted(
  caches: tuple[caches_lib.Cache, ...], by: jax.Array
) -> tuple[caches_lib.Cache, ...]:
  """Caches whose position `by` is now the first; what lies beyond the last is 0."""
  return jax.tree.map(lambda x: loop.shift_positions(x, by, axis=x.ndim - 2), caches)


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

  XLA:CPU begins what has its inputs. A cache that is written before it is read would be copied
  whole; tied to what the reads lead to, the write waits for them. And of ten small operations
  that are ready at once it gives half to another thread, which takes longer to wake than they
  take. (XLA:CPU drops `lax.optimization_barrier` before it decides on copies.)
  """
  bits = lax.bitcast_convert_type(made.reshape(-1)[0].astype(jnp.float32), jnp.int32)
  # Without its lowest bit and shifted, it is never negative, whatever the float is: adds 0.
  return position + jnp.minimum(lax.shift_right_logical(bits, 1), 0)


def after_each(
  position: jax.Array, rows: Sequence[layers.KeyValue], last: jax.Array
) -> list[jax.Array]:
  """`position` for every layer's cache, in a form that is known once that cache has been read.

  So writes become ready layer by layer, not all of them at the end. Elsewhere than on a CPU
  they wait for the last layer: a mesh would send one number more a layer.

  Args:
    position: [] or [batch].
    rows: keys and values of the layers, ascending.
    last: what the last layer's state led to.
  """
  end = after(position, last)
  if not platforms.wakes_threads():
    return [end] * len(rows)
  return [*(after(position, row.key) for row in rows[1:]), end]


@dataclasses.dataclass(frozen=True)
class Eager:
  """Skipped layers are filled at every token. The plain engine, and the one for any rule."""

  def __call__(self, task: Task) -> Bound:
    rule = task.rule
    assert not isinstance(rule, exits.Speculative)  # which runs no step
    table = attention_lib.bias_table(task.weights, task.config, task.length)

    def take_step(current, position, active, cache):
      decoder = decoder_lib.DecoderStep(
        task.weights,
        task.config,
        task.encoded,
        table.at(position, task.starts),
        table.current,
        task.native,
      )
      hidden = task.embed(current)
      generated = task.generated(position)
      made = rule(decoder.layers(cache), hidden, active, task.threshold, generated)
      keeps = task.keeps(position)
      ends = after_each(position, made.rows, made.head)
      return made, caches_lib.write_rows(cache, made.rows, ends, keeps)

    same = lambda caches, position: caches
    grow = functools.partial(grown, length=task.length)
    return Bound(task.empty_caches(), take_step, same, same, shifted, grow)
