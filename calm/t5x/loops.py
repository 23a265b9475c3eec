# Copyright 2026 The CALM Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Early exit inside decode loops of somebody else, on a mesh too.

Those loops know a function "tokens to logits" and a cache. They tile, flatten
and gather every leaf of the cache along axis 0, except the scalar
`cache_index`; so every leaf here has its row axis first, and constants
(cross-attention keys and values, the prefix) are bound into the function. They
return tokens and scores only; their exits come from `Loop.replay`, one
teacher-forced pass over the returned sequences, and are the loop's up to ties.

In T5X's partitioned step a conditional is one decision of the whole mesh: every
device would run as deep and as long as the deepest row. Under `over_rows` each
device ends a loop of its own, with the decoder's weights whole. Rows are split
along the model axis too: loops of different lengths with collectives inside
would wait for each other for ever. This module does not import T5X.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen import partitioning
from jax import core, lax, sharding
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import engines, loop
from calm.exits import layers as layers_lib
from calm.exits import schedules
from calm.exits import walk as walk_lib
from calm.t5 import attention, caches, layers, network

LoopCache = dict[str, Any]
# The axes that T5X's partitioner lays batches along; 'replica' where there are
# several slices.
DATA_AXES = ("replica", "data")
MODEL_AXIS = "model"
# Logical axes that T5X's rules lay along it.
_ALONG_MODEL = ("vocab", "heads", "joined_kv", "mlp")
# Parts of the parameters that decode loops read.
READ_IN_LOOPS = ("token_embedder", "decoder")
# Larger decoders are decoded across devices: half of a TPU v3 core's memory.
APART_BYTES = 8 * 2**30


# ---- Rows and their forced prefixes


@struct.dataclass
class Rows:
  """What is known of every row before it is decoded."""

  encoded: caches.Encoded  # the inputs' cross-attention keys and values
  # At position i, whether the token after it is the prefix's.
  forced: Bool[Array, "rows length"]
  generated: Int[Array, "rows length"]  # free positions before position i
  threshold: Float[Array, " rows"]  # lambda


def make_rows(
  encoded: caches.Encoded,
  prefix: Int[Array, "batch length"],
  threshold: Float[Array, "..."],
  num_decodes: int = 1,
) -> Rows:
  """Rows of a batch, each prompt `num_decodes` times in a row, as T5X's are.

  `prefix` is BOS (0), then tokens to be forced (no EOS), 0 where the model is
  free.
  """
  forced = jnp.pad(prefix[:, 1:], ((0, 0), (0, 1))) != 0
  free = jnp.logical_not(forced).astype(jnp.int32)
  rows = Rows(
    encoded=encoded,
    forced=forced,
    generated=jnp.cumsum(free, axis=1) - free,
    threshold=jnp.broadcast_to(
      jnp.asarray(threshold, jnp.float32), prefix.shape[:1]
    ),
  )
  if num_decodes == 1:
    return rows
  return jax.tree.map(lambda x: jnp.repeat(x, num_decodes, 0), rows)


@dataclasses.dataclass(frozen=True)
class AfterPrefix:
  """A schedule of free tokens: t starts after the prefix, which never exits.

  A forced token is context, not output: what it stores is of full depth.
  """

  inner: schedules.Schedule
  rows: Rows
  name: ClassVar[str] = "after_prefix"

  def __call__(self, threshold, position):
    here = self.inner(threshold, _at(self.rows.generated, position))
    forced = _at(self.rows.forced, position)
    return jnp.where(forced, schedules.NEVER_EXIT, here)


def _at(array: jax.Array, position: jax.Array) -> jax.Array:
  """The column of `array` [rows, length] at a position."""
  return lax.dynamic_index_in_dim(array, position, 1, keepdims=False)


def _put(array: jax.Array, position: jax.Array, column: jax.Array):
  return lax.dynamic_update_slice_in_dim(
    array, column[:, None], position, axis=1
  )


# ---- Loops


@struct.dataclass
class Exits:
  """How deep tokens went, [rows, length] each; prefixes and padding are 0."""

  exit_layers: jax.Array  # decoder layers run, 1-based, int32
  confidences: jax.Array  # the measure at the exit layer
  rejected_confidences: jax.Array  # the highest one measured and refused


@struct.dataclass
class LoopState:
  """The fields of T5X's `DecodingState` that "tokens to logits" reads."""

  cur_index: jax.Array  # [rows]
  sequences: jax.Array  # BOS, the prefix and what was generated, [rows, length]
  cur_token: jax.Array  # [rows, 1]
  cache: LoopCache


def rule_and_threshold(
  rule: exits.StepRule, default: float, given: Any
) -> tuple[exits.StepRule, Any]:
  """The rule to run, full depth if nothing exits, and the threshold."""
  if given is not None and not isinstance(given, core.Tracer):
    for value in np.ravel(given).tolist():
      schedules.check_threshold(value)
  dynamic = isinstance(rule, exits.DynamicExits)
  if dynamic and given is None and default == schedules.NEVER_EXIT:
    rule = exits.StaticExit()
  return rule, default if given is None else given


@dataclasses.dataclass(frozen=True)
class Loop:
  """The early-exit step as T5X's loops call it; static, as `program.Program`.

  `weights` of its methods are the decoder's, from `program.model_weights`,
  `rows` are from `make_rows`, and `eos_id` is the token that ends a row.
  """

  config: network.T5Config  # the model's sizes
  rule: exits.StepRule  # how a token goes through the layers
  length: int  # positions in the caches
  # How steps run; results do not depend on it. None: the fastest of the rule.
  engine: engines.Engine | None = None

  def _task(self, weights: Any, rows: Rows, forced: Rows) -> engines.Task:
    """The rule at work; `forced` says which positions must not exit."""
    rule = self.rule
    if isinstance(rule, exits.DynamicExits):
      schedule = AfterPrefix(rule.schedule, forced)
      rule = dataclasses.replace(rule, schedule=schedule)
    return engines.Task(
      self.config, rule, weights, rows.encoded, forced.threshold, self.length
    )

  def _bound(self, weights: Any, rows: Rows) -> engines.Bound:
    return engines.bind(self._task(weights, rows, rows), self.engine)

  def empty_cache(self, weights: Any, rows: Rows, batch_size: int) -> LoopCache:
    """A cache that T5X's loops can tile, flatten and gather: dictionaries.

    `batch_size` is the rows of the batch, before a loop multiplies them.
    """
    empty = self._bound(weights, rows).empty
    empty = jax.tree.map(lambda x: x[:batch_size] if x.ndim else x, empty)
    floats = jnp.zeros((batch_size, self.length), jnp.float32)
    noted = Exits(floats.astype(jnp.int32), floats, floats)
    return _to_loop(jnp.array(0, jnp.int32), vars(noted), empty)

  def bind(
    self,
    weights: Any,
    rows: Rows,
    eos_id: int | jax.Array,
    wide: bool = False,
  ) -> Callable[[Any], tuple[jax.Array, LoopCache]]:
    """The function that T5X's loops call with their state at every position.

    With `wide`, logits are as wide as the embedding, as T5X's are, so that one
    key draws the same; ids beyond the vocabulary have no probability.
    """
    bound = self._bound(weights, rows)

    def tokens_to_logits(state) -> tuple[jax.Array, LoopCache]:
      active = _is_active(state.sequences, eos_id)
      token = state.cur_token[:, 0]
      logits, cache = _step(bound, rows, token, active, state.cache)
      beyond = self.config.vocab_size - logits.shape[1] if wide else 0
      padding = ((0, 0), (0, beyond))
      return jnp.pad(logits, padding, constant_values=layers.MASK_BIAS), cache

    return tokens_to_logits

  def replay(
    self,
    weights: Any,
    rows: Rows,
    tokens: Int[Array, "rows length"],
    eos_id: int | jax.Array,
  ) -> Exits:
    """Exits of sequences that some loop returned, in one teacher-forced pass.

    What a layer reads of earlier tokens is known when the layer below has run,
    so that all positions of a sequence go up the layers together. `tokens` are
    prefix, generated tokens, padding.

    Raises:
      ValueError: the rule knows an exit only after the last layer.
    """
    if not isinstance(self.rule, exits.DynamicExits):
      raise ValueError(
        "Expected a rule exits.DynamicExits with T5X's loops, got"
        f" {type(self.rule).__name__}; bind decode_fn = @models.greedy_decode."
      )
    real = real_tokens(tokens, eos_id)
    inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    up = lambda given: self._go_up(weights, *given)
    # Rows over a mesh, or a symbolic number of them, are not taken one by one.
    if isinstance(self.engine, engines.Eager):
      return up((rows, inputs, real))
    single = jax.tree.map(lambda x: x[:, None], (rows, inputs, real))
    return jax.tree.map(lambda x: x[:, 0], lax.map(up, single))

  def _go_up(self, weights: Any, rows: Rows, inputs, real) -> Exits:
    flat = lambda x: x.reshape(-1, 1)
    threshold = jnp.repeat(rows.threshold, self.length)
    each = Rows(
      rows.encoded, flat(rows.forced), flat(rows.generated), threshold
    )
    task = self._task(weights, rows, each)
    bound, position = engines.Eager()(task), jnp.zeros((), jnp.int32)
    decoder = bound.decoder(position)
    rule: Any = task.rule  # of dynamic exits, which was asked before
    walk = rule.walk(decoder.layers(()), threshold, position)
    state = walk_lib.start(task.embed(inputs.reshape(-1)), real.reshape(-1))
    biases = bound.table.of_windows(position[None], self.length)
    for layer in range(1, self.config.num_decoder_layers + 1):
      given = walk.layer_input(layer, state)
      row = walk.stored(layer, state, decoder.project(layer, given))
      window = lambda x: attention.by_window(x, task.batch_size)
      attends = attention.WindowAttention(
        caches.Cache(window(row.key), window(row.value)),
        attention.of_layer(biases, layer),
        rows.encoded.cross[layer - 1],
        rows.encoded.bias,
        self.config.float32_attention_logits,
      )
      hidden = decoder.run_projected(layer, given, row, attends)
      state = walk.after(layer, state, hidden, row)
    found = state.exit_layer, state.confidence, state.rejected_confidence
    return Exits(*(x.reshape(inputs.shape) for x in found))

  def exits_of(
    self,
    weights: Any,
    rows: Rows,
    decodes: jax.Array,
    eos_id: Any,
    same_pass: list[Exits],
  ) -> dict[str, jax.Array]:
    """Exits in the order of the decodes, [batch, decodes, length], by name.

    `same_pass` holds the exits that the loop itself returned, if it did.
    """
    length = decodes.shape[-1]  # beam search may be told to stop earlier
    flat = decodes.reshape(-1, length)
    flat = jnp.pad(flat, ((0, 0), (0, self.length - length)))
    # A loop may go on with a row that it has ended.
    counted = real_tokens(flat, eos_id) & jnp.logical_not(rows.forced)
    if isinstance(self.rule, exits.StaticExit):
      depth = jnp.int32(self.rule.depth(self.config.num_decoder_layers))
      noted = {"exit_layers": jnp.broadcast_to(depth, counted.shape)}
    elif same_pass:
      noted = vars(same_pass[0])
    else:
      noted = vars(self.replay(weights, rows, flat, eos_id))
    shaped = lambda x: x[:, :length].reshape(decodes.shape)
    return {
      name: shaped(jnp.where(counted, of, 0)) for name, of in noted.items()
    }


def _step(bound: engines.Bound, rows: Rows, current, active, cache: LoopCache):
  """One position of every row -> logits and the cache after it."""
  position = cache["cache_index"]
  structure = jax.tree.structure(bound.empty)
  names = [f"carried_{i}" for i in range(structure.num_leaves)]
  leaves = [next(iter(cache[name].values())) for name in names]
  carried = jax.tree.unflatten(structure, leaves)
  made, carried = bound.take_step(current, position, active, carried)
  counted = active & jnp.logical_not(_at(rows.forced, position))
  columns = {
    "exit_layers": made.exit_layer,
    "confidences": made.confidence,
    "rejected_confidences": made.rejected_confidence,
  }
  noted = {
    name: _put(
      array, position, jnp.where(counted, columns[name], 0).astype(array.dtype)
    )
    for name, array in cache["exits"].items()
  }
  return made.logits, _to_loop(position + 1, noted, carried)


def _to_loop(
  position: jax.Array, noted: dict[str, jax.Array], carried: Any
) -> LoopCache:
  """T5X knows leaves without a row axis by their name, `cache_index`."""
  name = lambda leaf: "per_row" if leaf.ndim else "cache_index"
  leaves = enumerate(jax.tree.leaves(carried))
  return {
    "cache_index": position,
    "exits": noted,
    **{f"carried_{i}": {name(leaf): leaf} for i, leaf in leaves},
  }


def _is_active(sequences: jax.Array, eos_id: int | jax.Array) -> jax.Array:
  return jnp.all(sequences != eos_id, axis=1)


def real_tokens(
  tokens: Int[Array, "rows length"], eos_id: int | jax.Array
) -> Bool[Array, "rows length"]:
  """Tokens up to EOS, or else to the last one that is not padding."""
  is_eos = (tokens == eos_id).astype(jnp.int32)
  before = jnp.cumsum(is_eos, axis=1) - is_eos
  places = jnp.arange(tokens.shape[1])[None, :]
  last = jnp.max(jnp.where(tokens != 0, places, -1), axis=1)
  return (places <= last[:, None]) & (before == 0)


def greedy_decode(
  inputs: Int[Array, "batch length"],
  cache: LoopCache,
  tokens_to_logits: Callable[[LoopState], tuple[jax.Array, LoopCache]],
  eos_id: int,
  num_decodes: int = 1,
  decode_rng: Any = None,
  cache_offset: int = 0,
) -> tuple[jax.Array, jax.Array, Exits]:
  """Greedy decoding with its exits from the same pass: a T5X `decode_fn`.

  `inputs` is the prefix, from BOS on, 0 where the model is free; `cache` and
  `tokens_to_logits` are of a `Loop`; `num_decodes` is 1, and the last two are
  not used.

  Returns:
    Tokens [batch, 1, length], scores [batch, 1] (log-probabilities under the
    full head at the exit layers, nats), and `Exits` of [batch, length].
  """
  del decode_rng, cache_offset
  if num_decodes != 1:
    raise ValueError(
      f"Expected `num_decodes` of 1 for greedy decoding, got {num_decodes}; use"
      " T5X's `decoding.temperature_sample` or `decoding.beam_search`."
    )
  batch_size, length = inputs.shape
  # The prefix's token after each position, 0 where the model is free.
  prefix = jnp.pad(inputs[:, 1:], ((0, 0), (0, 2)))

  def unfinished(carry):
    state, _ = carry
    active = _is_active(state.sequences, eos_id)
    return (state.cur_index[0] < length) & jnp.any(active)

  def advance(carry):
    state, scores = carry
    position = state.cur_index[0]
    active = _is_active(state.sequences, eos_id)
    logits, cache = tokens_to_logits(state)
    emitted = loop.emit(layers_lib.greedy(logits), active)
    following = jnp.where(active, _at(prefix, position), 0)
    token = jnp.where(following == 0, emitted.token, following)
    sequences = _put(state.sequences, position + 1, token)
    scores += jnp.where(following == 0, emitted.log_probability, 0.0)
    state = LoopState(state.cur_index + 1, sequences, token[:, None], cache)
    return state, scores

  start = LoopState(
    jnp.zeros((batch_size,), jnp.int32),
    jnp.pad(inputs, ((0, 0), (0, 1))),
    jnp.zeros((batch_size, 1), jnp.int32),
    cache,
  )
  scores = jnp.zeros((batch_size,), jnp.float32)
  state, scores = lax.while_loop(unfinished, advance, (start, scores))
  tokens = state.sequences[:, None, 1:]
  return tokens, scores[:, None], Exits(**state.cache["exits"])


# ---- Rows of a device


def fits(weights: Any) -> bool:
  """Whether a device can hold these weights: `APART_BYTES` at most."""
  sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
  return sum(sizes) <= APART_BYTES


def row_axes(mesh: Any, num_rows: Any) -> tuple[str, ...]:
  """The axes of a mesh that rows are split along: all, its data axes, or none.

  The axes' sizes must divide `num_rows`; a symbolic number (`jax.export`) is
  never split.
  """
  every = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
  for axes in (every, tuple(name for name in every if name in DATA_AXES)):
    size = math.prod(mesh.shape[name] for name in axes)
    if axes and isinstance(num_rows, int) and num_rows % size == 0:
      return axes
  return ()


def rows_of_a_device(mesh: Any, axes: tuple[str, ...], num_rows: int) -> int:
  """Rows of a batch that a device decodes together, split along `axes`."""
  return num_rows // math.prod(mesh.shape[axis] for axis in axes)


def refuse_mesh(shapes: Any, axes: Any, mesh: Any) -> None:
  """Raises where arrays along these axes do not divide over a mesh.

  Raises:
    ValueError: naming an array, and the model axes that fit.
  """
  is_spec = lambda x: isinstance(x, sharding.PartitionSpec)
  specs = jax.tree.leaves(axes, is_leaf=is_spec)
  along, refused = 0, None
  for (path, x), spec in zip(
    jax.tree.leaves_with_path(shapes), specs, strict=True
  ):
    for size, name in zip(x.shape, spec, strict=False):
      along = math.gcd(along, size) if name == MODEL_AXIS else along
      if name == MODEL_AXIS and size % mesh.shape[name]:
        refused = (
          jax.tree_util.keystr(path, simple=True, separator="/"),
          x.shape,
        )
  if refused:
    fit = [n for n in range(1, mesh.size) if not mesh.size % n + along % n]
    raise ValueError(
      f"Expected a model axis that divides {refused[0]} {refused[1]}, got"
      f" {mesh.shape[MODEL_AXIS]} of {mesh.size} devices; axes of"
      f" {', '.join(map(str, fit))} fit: set num_partitions, or on a CPU, where"
      " T5X ignores it, the number of devices."
    )


def kept_whole(variables: Any) -> Any:
  """Variables of a model whose decoder every device is to keep whole.

  Axes of the decoder and the embedding in 'params_axes' are renamed to "kv",
  which T5X's rules lay along no mesh axis, and which its Adafactor factors as
  those that it replaces.
  """
  renamed = lambda names: ("kv" if n in _ALONG_MODEL else n for n in names)
  rename = lambda axes: axes.replace(
    names=sharding.PartitionSpec(*renamed(axes.names))
  )
  is_axes = lambda x: isinstance(x, partitioning.AxisMetadata)
  axes = dict(variables["params_axes"])
  for part in READ_IN_LOOPS:
    axes[part] = jax.tree.map(rename, axes[part], is_leaf=is_axes)
  axes = type(variables["params_axes"])(axes)
  return type(variables)({**variables, "params_axes": axes})


def whole(weights: Any, mesh: Any, at_rest: bool = False) -> Any:
  """The decoder's weights, whole on every device, as `over_rows` shares them.

  `at_rest`: they are whole already along the model axis (`kept_whole`).
  """
  if dict(mesh.shape).get(MODEL_AXIS, 1) > 1 and not at_rest:
    logging.getLogger(__name__).warning(
      "Every batch gathers the decoder's weights, which lie along the model"
      " axis; for inference give the model `whole_decoder = True`, and they"
      " stay whole on every device."
    )
  place = sharding.NamedSharding(mesh, sharding.PartitionSpec())
  put = lambda leaf: jax.lax.with_sharding_constraint(leaf, place)
  return jax.tree.map(put, weights)


def over_rows(
  function: Callable[[Any, Any, Any], Any], mesh: Any, axes: tuple[str, ...]
) -> Callable[[Any, Any, Any], Any]:
  """`function`(shared, rows, rng), each device with its own rows.

  `rows` and what it returns are trees of arrays [rows, ...], split along `axes`
  (from `row_axes`); every device sees the tree `shared` whole. Each draws by a
  key of its own, and so otherwise than one device would.
  """
  if not axes:
    return function

  def local(shared, rows, rng):
    if rng is not None:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axes))
    return function(shared, rows, rng)

  every, split = sharding.PartitionSpec(), sharding.PartitionSpec(axes)
  # Not checked: a `while_loop` whose number of turns varies over devices is
  # what this is for, and the check takes constants in its carry for unvarying.
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(every, split, every),
    out_specs=split,
    check_vma=False,
  )
