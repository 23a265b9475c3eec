"""Exits whose skipped layers are filled later, many positions in one matrix product.

Their keys and values are a function of the exit state alone (section 3.2), which is kept,
[batch, length, emb]. A layer that some row needs first projects what is pending, then runs for
every row; one that no row needs does nothing. Each is a loop of at most one turn, whose body
may update its cache in place, unlike the branches of a conditional."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from calm import exits
from calm.decode import loop
from calm.decode.engines import engine as engine_lib
from calm.exits import walk as walk_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import platforms


@struct.dataclass
class LayerFill:
  """One layer's cache, and how many positions of it are filled, []."""

  cache: caches_lib.Cache
  filled: jax.Array


@struct.dataclass
class DeferredCache:
  """What the loop carries."""

  layers: tuple[LayerFill, ...]
  # What is kept of every position for the layers that it skipped, [batch, length, width].
  states: jax.Array


class Deferred(engine_lib.Eager):
  """Skipped layers are filled when a token first needs them. For `exits.DynamicExits` with a
  propagation that `projects_state`."""

  # States (rows times positions) that are projected in one product, about, where more than one
  # position is pending. A bound on work, not on what is pending.
  chunk_rows: ClassVar[int] = 32

  def __init__(self, task: engine_lib.Task):
    super().__init__(task)
    self.rule: Any = task.rule
    small = min(platforms.least_positions(task.batch_size), task.length)
    # Eight rows cost about what two do: a product that small takes the time to read its matrix.
    large = max(min(self.chunk_rows // task.batch_size, 8, task.length), small)
    self.chunks = tuple(sorted({large, small}, reverse=True))  # positions of one product

  @property
  def empty(self) -> DeferredCache:
    return self.resume(self.task.empty_caches(), jnp.zeros((), jnp.int32))

  def resume(self, caches: tuple[caches_lib.Cache, ...], position: jax.Array) -> DeferredCache:
    """With caches that are filled up to `position`, and where `task.kept` says beyond it."""
    task = self.task
    fills = tuple(LayerFill(cache, position) for cache in caches)
    kept = jax.eval_shape(self._kept_of_one_layer)
    shape = task.batch_size, task.length, kept.shape[-1]
    return DeferredCache(fills, jnp.zeros(shape, kept.dtype))

  def _kept_of_one_layer(self) -> jax.Array:
    """What is kept of a position, of tokens that ran one layer."""
    task, layers = self.task, self.decoder(jnp.zeros((), jnp.int32)).layers(())
    hidden = jnp.zeros((task.batch_size, task.config.emb_dim), jnp.dtype(task.config.dtype))
    done, row = jnp.zeros(task.batch_size, bool), layers.project(1, hidden)
    memory = self.rule.propagation.remember(None, 1, hidden, row, done, layers)
    return self.rule.propagation.state(hidden, memory)

  def take_step(self, current, position, active, cache: DeferredCache):
    decoder = self.decoder(position)
    walk = self.walk(decoder, position)
    state = walk_lib.start(self.task.embed(current), active)
    fills: list[LayerFill] = []
    for segment in segments(walk.allowed, walk.layers.num_layers):
      carry = state, tuple(cache.layers[k - 1] for k in segment)
      body = lambda carry, segment=segment: self._run(
        walk, decoder, segment, position, cache.states, carry
      )
      needed = jnp.any(~state.done)
      state, made = body(carry) if segment[0] == 1 else loop.run_if(needed, body, carry)
      fills += made
    states = self.stored(cache.states, state, position)
    return exits.token_exit(walk, state, active), DeferredCache(tuple(fills), states)

  def stored(self, states: jax.Array, state: walk_lib.WalkState, position) -> jax.Array:
    """`states` with what the layers that were skipped at `position` will project from."""
    kept = self.rule.propagation.state(state.hidden, state.memory)
    return lax.dynamic_update_slice_in_dim(states, kept[:, None], position, axis=1)

  def flush(self, cache: DeferredCache, position: jax.Array) -> tuple[caches_lib.Cache, ...]:
    decoder = self.decoder(jnp.zeros((), jnp.int32))
    return tuple(
      self.fill(decoder, layer, fill, position, cache.states).cache
      for layer, fill in enumerate(cache.layers, start=1)
    )

  def grow(self, cache: DeferredCache) -> DeferredCache:
    length = self.task.length
    caches = engine_lib.grown(tuple(fill.cache for fill in cache.layers), length)
    fills = tuple(map(LayerFill, caches, (fill.filled for fill in cache.layers)))
    return DeferredCache(fills, engine_lib.grown_array(cache.states, length, axis=1))

  def walk(self, decoder: decoder_lib.DecoderStep, position: jax.Array) -> walk_lib.Walk:
    return self.rule.walk(decoder.layers(()), self.task.threshold, position)

  def _run(self, walk: walk_lib.Walk, decoder, segment, position, states, carry):
    """The layers from one possible exit to the next, for every row."""
    state, fills = carry
    made = []
    for layer, fill in zip(segment, fills, strict=True):
      if segment[0] > 1:  # the layers before the first exit are never behind
        fill = self.fill(decoder, layer, fill, position, states)
      state, fill = self._run_layer(walk, decoder, layer, position, state, fill)
      made.append(fill)
    return state, tuple(made)

  def _run_layer(self, walk, decoder, layer, position, state, fill):
    hidden, row = decoder.run(layer, walk.layer_input(layer, state), fill.cache)
    row = walk.stored(layer, state, row)
    made = walk.after(layer, state, hidden, row)
    end = engine_lib.after(position, hidden)
    (cache,) = caches_lib.write_rows((fill.cache,), (row,), (end,), self.task.keeps(position))
    return made, LayerFill(cache, position + 1)

  def fill(
    self, decoder, layer: int, fill: LayerFill, position, states, needed: Any = True
  ) -> LayerFill:
    """Projects what is pending of a layer, chunk by chunk, if it is needed."""
    for chunk in self.chunks:
      least = 1 if chunk == self.chunks[-1] else 2

      def pending(fill: LayerFill, least=least) -> jax.Array:
        return (position - fill.filled >= least) & needed

      def project(fill: LayerFill, chunk=chunk) -> LayerFill:
        return self._project(decoder, layer, fill, states, chunk)

      fill = lax.while_loop(pending, project, fill)
    return LayerFill(fill.cache, jnp.where(needed, position, fill.filled))

  def _project(self, decoder, layer: int, fill: LayerFill, states, chunk: int) -> LayerFill:
    """Fills `chunk` positions from `fill.filled` on; what lies beyond the pending ones is noise
    that is written over before it is read."""
    length = states.shape[1]
    start = jnp.minimum(fill.filled, length - chunk)
    window = lax.dynamic_slice_in_dim(states, start, chunk, axis=1)
    flat, layers = window.reshape(-1, window.shape[-1]), decoder.layers(())
    row = decoder.project(layer, self.rule.propagation.layer_input(layer, flat, layers))
    split = lambda x: x.reshape(states.shape[0], chunk, *x.shape[1:])
    # Near the end the chunk begins before `filled`: what is there stays.
    positions = (start + jnp.arange(chunk))[None, :]
    new = positions >= fill.filled
    if self.task.kept is not None:
      new = new & (positions >= self.task.kept[:, None])

    def merge(cache, update):
      axis = cache.ndim - 2
      update = caches_lib.as_positions(split(update), cache)
      old = lax.dynamic_slice_in_dim(cache, start, chunk, axis=axis)
      pending = new[:, :, None] if axis == 1 else new[:, None, :, None]
      update = jnp.where(pending, update, old)
      return lax.dynamic_update_slice_in_dim(cache, update, start, axis=axis)

    made = caches_lib.Cache(
      merge(fill.cache.keys, row.key), merge(fill.cache.values, row.value)
    )
    return LayerFill(made, fill.filled + chunk)


def segments(allowed: Sequence[int], num_layers: int) -> list[tuple[int, ...]]:
  """Runs of layers between which a row may leave: (1, 2), (3,), ... for allowed 2, 3, ..."""
  ends = [*allowed, num_layers]
  starts = [1, *(end + 1 for end in allowed)]
  return [tuple(range(a, b + 1)) for a, b in zip(starts, ends, strict=True)]
