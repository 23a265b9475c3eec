"""How the layers of one step are run, and when skipped ones are filled: the
same results.

`default_engine` takes the fastest engine of a rule, a number of rows and a
platform. `Eager` is the plain one. `Deferred` keeps exit states, [batch,
length, emb], of which skipped layers' keys and values are a function (section
3.2): a layer that some row needs first projects what is pending, then runs for
every row; one that no row needs does nothing. Each is a loop of at most one
turn, whose body may update its cache in place, unlike the branches of a
conditional. `Compacted` runs a layer on the smallest bucket (0, 4, 16, 32 rows,
say) that holds the rows that stay, by one `lax.switch`: tokens stay in step,
and what a row gets does not depend on its bucket.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from calm import exits
from calm.decode import loop
from calm.exits import layers as layers_lib
from calm.exits import walk as walk_lib
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
  # of learned propagation what the rule reads
  weights: decoder_weights.DecoderWeights
  encoded: caches_lib.Encoded  # the prompts
  threshold: jax.Array  # lambda, [] or [batch]
  length: int  # positions in the caches
  # Positions of each row that are decoded already and that nothing may write
  # over, [batch].
  kept: jax.Array | None = None
  # Whether attention, products and heads may be functions of this process
  # (`t5.kernels`): not in programs that are exported or that a compiler splits
  # over devices.
  native: bool = False

  def __post_init__(self):
    # Once a program, not once a step: a step's codes are as wide as the exits
    # that it may take.
    read = self.weights.for_exits(self.rule, self.config.num_decoder_layers)
    object.__setattr__(self, "weights", read)

  @property
  def batch_size(self) -> int:
    return self.encoded.bias.shape[0]

  def embed(self, tokens: jax.Array) -> jax.Array:
    """What the first layer gets, [batch, emb_dim], in the activation dtype."""
    table = self.weights.embedding
    # XLA:CPU gives half of a gather from a large matrix to another thread, and
    # to wake it takes longer than to copy a few rows.
    if self.native and platforms.is_cpu() and len(tokens) <= _FEW_ROWS:
      rows = [lax.dynamic_slice_in_dim(table, token, 1) for token in tokens]
      return jnp.concatenate(rows).astype(self.config.dtype)
    return table[tokens].astype(self.config.dtype)

  def keeps(self, position: jax.Array) -> jax.Array | None:
    """The rows that are decoded already at `position`, [batch] bool."""
    return None if self.kept is None else position < self.kept

  def empty_caches(self) -> tuple[caches_lib.Cache, ...]:
    depth = self.rule.depth(self.config.num_decoder_layers)
    return caches_lib.empty_caches(
      self.config, self.batch_size, self.length, depth
    )


class Eager:
  """The plain engine, and the one for any rule: skipped layers are filled at
  every token.
  """

  def __init__(self, task: Task):
    self.task = task
    self.table = attention_lib.bias_table(
      task.weights, task.config, task.length
    )

  @property
  def empty(self) -> Any:
    """What the loop carries before the first token."""
    return self.task.empty_caches()

  def take_step(
    self, current, position, active, cache
  ) -> tuple[exits.TokenExit, Any]:
    """The loop's step."""
    task = self.task
    rule = self.task.rule
    assert not isinstance(rule, exits.Speculative)  # which runs no step
    decoder = self.decoder(position)
    hidden = task.embed(current)
    made = rule(decoder.layers(cache), hidden, active, task.threshold, position)
    keeps = task.keeps(position)
    ends = after_each(position, made.rows, made.head)
    return made, caches_lib.write_rows(cache, made.rows, ends, keeps)

  def resume(
    self, caches: tuple[caches_lib.Cache, ...], position: jax.Array
  ) -> Any:
    """What the loop carries to go on from `position`, from every layer's
    cache.
    """
    return caches

  def flush(
    self, cache: Any, position: jax.Array
  ) -> tuple[caches_lib.Cache, ...]:
    """Every layer's cache, filled up to `position`, from what the loop
    carries.
    """
    return cache

  def decoder(self, position: jax.Array) -> decoder_lib.DecoderStep:
    task = self.task
    bias = self.table.at(position)
    return decoder_lib.DecoderStep(
      task.weights,
      task.config,
      task.encoded,
      bias,
      self.table.current,
      task.native,
    )


def grown(carried: Any, length: int) -> Any:
  """What a loop carries, with room for so many positions; beyond those that
  there were is 0.
  """

  def grow(x: jax.Array) -> jax.Array:
    if not x.ndim:  # how far a layer is filled
      return x
    return jnp.pad(
      x, [(0, 0)] * (x.ndim - 2) + [(0, length - x.shape[-2]), (0, 0)]
    )

  return jax.tree.map(grow, carried)


def after(position: jax.Array, made: jax.Array) -> jax.Array:
  """`position`, in a form that XLA can know only once it has `made` (any float
  array).

  XLA:CPU begins what has its inputs: a cache that is written before it is read
  would be copied whole, and of ten small operations that are ready at once half
  go to another thread, which takes longer to wake. (It drops
  `lax.optimization_barrier` before it decides on copies.)
  """
  bits = lax.bitcast_convert_type(
    made.reshape(-1)[0].astype(jnp.float32), jnp.int32
  )
  # Without its lowest bit and shifted, it is never negative, whatever the float
  # is: adds 0.
  return position + jnp.minimum(lax.shift_right_logical(bits, 1), 0)


def after_each(
  position: jax.Array, rows: Sequence[layers_lib.KeyValue], last: jax.Array
) -> list[jax.Array]:
  """`position` for every layer's cache, known once that has been read: writes
  become ready layer by layer. Elsewhere than on a CPU they wait for what the
  last layer's state led to, as a mesh would send one number more a layer.
  """
  end = after(position, last)
  if not platforms.is_cpu():
    return [end] * len(rows)
  return [*(after(position, row.key) for row in rows[1:]), end]


@struct.dataclass
class LayerFill:
  """One layer's cache, and how many positions of it are filled, []."""

  cache: caches_lib.Cache
  filled: jax.Array


@struct.dataclass
class DeferredCache:
  """What the loop carries."""

  layers: tuple[LayerFill, ...]
  # What is kept of every position for the layers that it skipped, [batch,
  # length, width].
  states: jax.Array


class Deferred(Eager):
  """Skipped layers are filled when a token first needs them. For
  `exits.DynamicExits` with a propagation that `projects_state`.
  """

  # States (rows times positions) that are projected in one product, about,
  # where more than one position is pending. A bound on work, not on what is
  # pending.
  chunk_rows: ClassVar[int] = 32

  def __init__(self, task: Task):
    super().__init__(task)
    self.rule: Any = task.rule
    small = min(platforms.least_positions(task.batch_size), task.length)
    # Eight rows cost about what two do: a product that small takes the time to
    # read its matrix.
    large = max(min(self.chunk_rows // task.batch_size, 8, task.length), small)
    # positions of one product
    self.chunks = tuple(sorted({large, small}, reverse=True))

  @property
  def empty(self) -> DeferredCache:
    return self.resume(self.task.empty_caches(), jnp.zeros((), jnp.int32))

  def resume(
    self, caches: tuple[caches_lib.Cache, ...], position: jax.Array
  ) -> DeferredCache:
    """With caches that are filled up to `position`, and where `task.kept` says
    beyond it.
    """
    task = self.task
    fills = tuple(LayerFill(cache, position) for cache in caches)
    kept = jax.eval_shape(self._kept_of_one_layer)
    shape = task.batch_size, task.length, kept.shape[-1]
    return DeferredCache(fills, jnp.zeros(shape, kept.dtype))

  def _kept_of_one_layer(self) -> jax.Array:
    """What is kept of a position, of tokens that ran one layer."""
    task = self.task
    layers = self.decoder(jnp.zeros((), jnp.int32)).layers(())
    hidden = jnp.zeros(
      (task.batch_size, task.config.emb_dim), jnp.dtype(task.config.dtype)
    )
    done = jnp.zeros(task.batch_size, bool)
    row = layers.project(1, hidden)
    memory = self.rule.propagation.remember(None, 1, hidden, row, done, layers)
    return self.rule.propagation.state(hidden, memory)

  def take_step(self, current, position, active, cache: DeferredCache):
    decoder = self.decoder(position)
    walk = self.walk(decoder, position)
    state = walk_lib.start(self.task.embed(current), active)
    fills: list[LayerFill] = []
    for segment in segments(walk.allowed, walk.layers.num_layers):
      carry = state, tuple(cache.layers[k - 1] for k in segment)

      def body(carry, segment=segment):
        return self._run(walk, decoder, segment, position, cache.states, carry)

      needed = jnp.any(~state.done)
      state, made = (
        body(carry) if segment[0] == 1 else loop.run_if(needed, body, carry)
      )
      fills += made
    states = self.stored(cache.states, state, position)
    return exits.token_exit(walk, state, active), DeferredCache(
      tuple(fills), states
    )

  def stored(
    self, states: jax.Array, state: walk_lib.WalkState, position
  ) -> jax.Array:
    """`states` with what the layers that were skipped at `position` will
    project from.
    """
    kept = self.rule.propagation.state(state.hidden, state.memory)
    return lax.dynamic_update_slice_in_dim(
      states, kept[:, None], position, axis=1
    )

  def flush(
    self, cache: DeferredCache, position: jax.Array
  ) -> tuple[caches_lib.Cache, ...]:
    decoder = self.decoder(jnp.zeros((), jnp.int32))
    return tuple(
      self.fill(decoder, layer, fill, position, cache.states).cache
      for layer, fill in enumerate(cache.layers, start=1)
    )

  def walk(
    self, decoder: decoder_lib.DecoderStep, position: jax.Array
  ) -> walk_lib.Walk:
    return self.rule.walk(decoder.layers(()), self.task.threshold, position)

  def _run(
    self, walk: walk_lib.Walk, decoder, segment, position, states, carry
  ):
    """The layers from one possible exit to the next, for every row."""
    state, fills = carry
    made = []
    for layer, fill in zip(segment, fills, strict=True):
      if segment[0] > 1:  # the layers before the first exit are never behind
        fill = self.fill(decoder, layer, fill, position, states)
      hidden, row = decoder.run(
        layer, walk.layer_input(layer, state), fill.cache
      )
      row = walk.stored(layer, state, row)
      state, end = (
        walk.after(layer, state, hidden, row),
        after(position, hidden),
      )
      keeps = self.task.keeps(position)
      (cache,) = caches_lib.write_rows((fill.cache,), (row,), (end,), keeps)
      made.append(LayerFill(cache, position + 1))
    return state, tuple(made)

  def fill(
    self,
    decoder,
    layer: int,
    fill: LayerFill,
    position,
    states,
    needed: Any = True,
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

  def _project(
    self, decoder, layer: int, fill: LayerFill, states, chunk: int
  ) -> LayerFill:
    """Fills `chunk` positions from `fill.filled` on; what lies beyond the
    pending ones is noise that is written over before it is read.
    """
    length = states.shape[1]
    start = jnp.minimum(fill.filled, length - chunk)
    window = lax.dynamic_slice_in_dim(states, start, chunk, axis=1)
    flat = window.reshape(-1, window.shape[-1])
    layers = decoder.layers(())
    row = decoder.project(
      layer, self.rule.propagation.layer_input(layer, flat, layers)
    )

    def split(x):
      return x.reshape(states.shape[0], chunk, *x.shape[1:])

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
  """Runs of layers between which a row may leave: (1, 2), (3,), ... for allowed
  2, 3, ...
  """
  ends = [*allowed, num_layers]
  starts = [1, *(end + 1 for end in allowed)]
  return [tuple(range(a, b + 1)) for a, b in zip(starts, ends, strict=True)]


@struct.dataclass
class Bucket:
  """Which rows a bucket holds; those that stay come first, in their order."""

  order: jax.Array  # the bucket's rows, [bucket] int32
  # where each row lies, [batch] int32; beyond the bucket: not in it
  rank: jax.Array

  def present(self, count: jax.Array) -> jax.Array:
    """Its rows, [bucket], of which the first `count` are there, and -1 for the
    others.
    """
    there = jnp.arange(len(self.order), dtype=jnp.int32) < count
    return jnp.where(there, self.order, -1)

  def take(self, tree: Any) -> Any:
    """The bucket's rows of arrays [batch, ...]."""
    return jax.tree.map(lambda x: _rows(x, self.order), tree)

  def spread(self, tree: Any) -> Any:
    """Arrays [bucket, ...] as [batch, ...]; rows that are not in the bucket
    hold anything.
    """
    places = jnp.minimum(self.rank, len(self.order) - 1)
    return jax.tree.map(lambda x: _rows(x, places), tree)


def _rows(x: jax.Array, numbers: jax.Array) -> jax.Array:
  """`x[numbers]`, without what it takes to count from the end or to check
  bounds.
  """
  return x.at[numbers].get(
    mode="promise_in_bounds", wrap_negative_indices=False
  )


def compact(stays: jax.Array) -> Bucket:
  """All rows, those that stay first."""
  stays = stays.astype(jnp.int32)
  # Places without a sort: those that stay by their number, then the others by
  # theirs.
  before = jnp.cumsum(stays) - stays
  others = jnp.cumsum(1 - stays) - (1 - stays)
  rank = jnp.where(stays > 0, before, jnp.sum(stays) + others)
  numbers = jnp.arange(len(stays), dtype=jnp.int32)
  is_at = rank[None, :] == numbers[:, None]
  order = jnp.sum(jnp.where(is_at, numbers[None, :], 0), axis=1)
  return Bucket(order.astype(jnp.int32), rank.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Spread:
  """A bucket's attention, run in all rows of the batch."""

  whole: attention_lib.Attention
  rows: Bucket

  def to_past(self, query: jax.Array, row: layers_lib.KeyValue) -> jax.Array:
    query, row = self.rows.spread((query, row))
    return self.rows.take(self.whole.to_past(query, row))

  def to_prompt(self, query: jax.Array) -> jax.Array:
    return self.rows.take(self.whole.to_prompt(self.rows.spread(query)))


class Compacted(Deferred):
  """Layers run on the rows that need them. For `exits.DynamicExits` and several
  rows.
  """

  # Each bucket is the next larger one by this, from half the batch down to two
  # rows: 4 makes 4 and 16 of 32. Every one is a program more a layer: more fit
  # better, fewer compile faster.
  ratio: ClassVar[int] = 4

  @property
  def sizes(self) -> tuple[int, ...]:
    """0, the buckets that are smaller than the batch, and the batch."""
    rows = self.task.batch_size
    halves = (rows // 2 // self.ratio**i for i in range(rows.bit_length()))
    # A product of one row takes the time of two.
    return (0, *sorted({size for size in halves if size > 1}), rows)

  def take_step(self, current, position, active, cache: DeferredCache):
    task = self.task
    decoder = self.decoder(position)
    walk = self.walk(decoder, position)
    state = _complete(walk, walk_lib.start(task.embed(current), active))
    fills: list[LayerFill] = []
    for segment in segments(walk.allowed, walk.layers.num_layers):
      stays = ~state.done
      needed = jnp.any(stays)
      before = [
        self.fill(
          decoder, k, cache.layers[k - 1], position, cache.states, needed
        )
        for k in segment
      ]
      old = tuple(fill.cache for fill in before)
      steps = dict(zip(segment, old, strict=True))
      state, rows = self._switch(walk, decoder, steps, state, stays)
      end = after(position, state.hidden)
      caches = caches_lib.write_rows(
        old, rows, (end,) * len(old), task.keeps(position)
      )
      filled = [jnp.where(needed, position + 1, fill.filled) for fill in before]
      fills += map(LayerFill, caches, filled)
    states = self.stored(cache.states, state, position)
    return exits.token_exit(walk, state, active), DeferredCache(
      tuple(fills), states
    )

  def _switch(
    self, walk, decoder, steps: dict[int, caches_lib.Cache], state, stays
  ):
    """The segment, {layer: its cache}, on the smallest bucket that holds the
    rows that stay: (state, rows that its layers store).
    """
    rows = compact(stays)
    branches = [
      lambda state, rows, size=size: self._run_bucket(
        walk, decoder, steps, state, Bucket(rows.order[:size], rows.rank)
      )
      for size in self.sizes[1:-1]
    ]
    branches = [
      lambda state, rows: self._run_none(steps, state),
      *branches,
      lambda state, rows: self._run_all(walk, decoder, steps, state),
    ]
    larger = jnp.sum(stays) > jnp.array(self.sizes[:-1])
    return lax.switch(jnp.sum(larger), branches, state, rows)

  def _run_none(self, steps, state):
    """Nothing is stored: what this writes is written over by a fill."""
    config = self.task.config
    shape = self.task.batch_size, config.num_heads, config.head_dim
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
    return state, (layers_lib.KeyValue(zeros, zeros),) * len(steps)

  def _run_all(self, walk: walk_lib.Walk, decoder, steps, state):
    stored = []
    for layer, cache in steps.items():
      hidden, row = decoder.run(layer, walk.layer_input(layer, state), cache)
      row = walk.stored(layer, state, row)
      state = walk.after(layer, state, hidden, row)
      stored.append(row)
    return state, tuple(stored)

  def _run_bucket(
    self, walk: walk_lib.Walk, decoder, steps, state, rows: Bucket
  ):
    """The bucket alone runs; all rows store."""
    threshold = (
      walk.threshold if walk.threshold.ndim == 0 else rows.take(walk.threshold)
    )
    inside = dataclasses.replace(walk, threshold=threshold)
    stays = ~state.done
    part = _part(state, rows)
    count = jnp.sum(stays)
    stored = []
    for layer, cache in steps.items():
      row = decoder.project(layer, walk.layer_input(layer, state))
      kept = walk.stored(layer, state, row)
      part_row = rows.take(row)
      whole = decoder.attention(layer, part.hidden, cache, rows.present(count))
      attention = whole if whole.native else _Spread(whole, rows)
      hidden = decoder.run_projected(layer, part.hidden, part_row, attention)
      part = inside.after(layer, part, hidden, part_row)
      hidden = layers_lib.select_rows(
        stays, rows.spread(part.hidden), state.hidden
      )
      state = dataclasses.replace(state, hidden=hidden)
      stored.append(kept)
    # Rows that had left stay as they are.
    return layers_lib.select_rows(stays, rows.spread(part), state), tuple(
      stored
    )


def _part(state: walk_lib.WalkState, rows: Bucket) -> walk_lib.WalkState:
  """The bucket's rows. Of those that stay nothing about their exit is known
  yet.
  """
  hidden, done, rejected, memory = rows.take(
    (state.hidden, state.done, state.rejected_confidence, state.memory)
  )
  zeros = jnp.zeros(done.shape, jnp.float32)
  return walk_lib.WalkState(
    hidden, done, zeros.astype(jnp.int32), zeros, rejected, None, memory
  )


def _complete(
  walk: walk_lib.Walk, state: walk_lib.WalkState
) -> walk_lib.WalkState:
  """With zeros for what the first layers would set: a switch changes no
  structure.
  """
  layers = walk.layers

  def made(hidden):
    row = layers.project(1, hidden)
    memory = walk.propagation.remember(None, 1, hidden, row, state.done, layers)
    read = layers.read(1, hidden)
    logits = layers.logits(read) if walk.measure.uses_head else None
    greedy = None if logits is None else layers.peaks(logits).greedy
    read = read if walk.carries_read else None
    return {"logits": logits, "greedy": greedy, "memory": memory, "read": read}

  shapes = jax.eval_shape(made, state.hidden)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return dataclasses.replace(state, **zeros)


# A class of engines, of which an instance runs one task: `Eager`, or a
# subclass.
Engine = type[Eager]

# From so many rows on, the layers that they save by leaving pay for moving
# those that stay.
MANY_ROWS = 8

# By platform, (from this many rows on, engine), ascending: cpu as measured
# (scripts/README.md), tpu as its compiler estimates (scripts/results/tpu.json),
# where `Compacted` lays matrices out anew at every token. `Eager` projects a
# seventh of a layer for every one that is skipped.
_BY_PLATFORM: Mapping[str, tuple[tuple[int, Engine], ...]] = {
  "cpu": ((1, Deferred), (MANY_ROWS, Compacted)),
  "tpu": ((1, Deferred),),
}


def default_engine(
  rule: exits.Rule, rows: Any, platform: str | None = None
) -> Engine:
  """The engine that is fastest for a rule and a number of rows on a platform.

  Args:
    rule: how a token goes through the layers.
    rows: of the batch, or of one shard of it; where it is symbolic
      (`jax.export`), `Eager`, which need not know it.
    platform: 'cpu', 'tpu', ...; None: JAX's default. Platforms that nothing is
      known of are treated like a CPU.
  """
  defers = (
    isinstance(rule, exits.DynamicExits) and rule.propagation.projects_state
  )
  if not defers or not isinstance(rows, int):
    return Eager
  known = _BY_PLATFORM.get(
    platform or jax.default_backend(), _BY_PLATFORM["cpu"]
  )
  return [engine for least, engine in known if least <= max(rows, 1)][-1]
