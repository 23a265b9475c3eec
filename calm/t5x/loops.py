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

Those loops know a function "tokens to logits" and a cache, of which they tile,
flatten and gather every leaf along axis 0, except the scalar `cache_index`; so
constants (cross-attention keys and values, the prefix) are bound into the
function. They return tokens and scores only; their exits come from
`Loop.replay`, one teacher-forced pass over the returned sequences, and are the
loop's up to ties. This module does not import T5X.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.linen import partitioning
from jax import lax, sharding
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import engines, loop
from calm.exits import layers as layers_lib
from calm.exits import schedules
from calm.exits import walk as walk_lib
from calm.t5 import attention, caches, layers, network

# What is known of a token's way beside its layers, where one is measured.
MEASURED = ("confidences", "rejected_confidences")
# The axes that T5X's partitioner lays batches along; 'replica' where there are
# several slices.
DATA_AXES = ("replica", "data")
# Logical axes that T5X's rules lay along its 'model' axis.
_ALONG_MODEL = ("vocab", "heads", "joined_kv", "mlp")
# Larger decoders are decoded across devices: half of a TPU v3 core's memory.
APART_BYTES = 8 * 2**30


@struct.dataclass
class Rows:
  """What is known of every row before it is decoded."""

  encoded: caches.Encoded  # the inputs' cross-attention keys and values
  prefix: Int[Array, "rows length"]  # the token after a position; 0: free
  generated: Int[Array, "rows length"]  # free positions before a position
  threshold: Float[Array, " rows"]  # lambda


def make_rows(
  encoded: caches.Encoded,
  prefix: Int[Array, "batch length"],
  threshold: Float[Array, "..."],
  num_decodes: int = 1,
) -> Rows:
  """Rows of a batch, each prompt `num_decodes` times in a row; `prefix` is BOS
  (0), then tokens to be forced (no EOS), 0 where the model is free."""
  following = jnp.pad(prefix[:, 1:], ((0, 0), (0, 1)))
  free = (following == 0).astype(jnp.int32)
  threshold = jnp.asarray(threshold, jnp.float32)
  threshold = jnp.broadcast_to(threshold, prefix.shape[:1])
  rows = Rows(encoded, following, jnp.cumsum(free, axis=1) - free, threshold)
  if num_decodes == 1:
    return rows
  return jax.tree.map(lambda x: jnp.repeat(x, num_decodes, 0), rows)


@dataclasses.dataclass(frozen=True)
class AfterPrefix:
  """A schedule of free tokens: t starts after the prefix, which never exits."""

  inner: schedules.Schedule
  rows: Rows
  name: ClassVar[str] = "after_prefix"

  def __call__(self, threshold, position):
    here = self.inner(threshold, _at(self.rows.generated, position))
    forced = _at(self.rows.prefix, position) != 0
    return jnp.where(forced, schedules.NEVER_EXIT, here)


def _at(array: jax.Array, position: jax.Array) -> jax.Array:
  """The column of `array` [rows, length] at a position."""
  return lax.dynamic_index_in_dim(array, position, 1, keepdims=False)


@dataclasses.dataclass(eq=False)
class Loop:
  """The early-exit step at work, as T5X's loops call it: "tokens to logits".

  Logits are as wide as T5X's, so that one key draws the same; ids beyond the
  vocabulary have no probability.
  """

  config: network.T5Config  # the model's sizes
  rule: exits.StepRule  # how a token goes through the layers
  weights: Any  # the decoder's, from `program.model_weights`
  rows: Rows  # from `make_rows`
  eos_id: int | jax.Array  # the token that ends a row
  # How steps run; results do not depend on it. None: the fastest of the rule.
  engine: engines.Engine | None = None

  def __post_init__(self):
    self.length = self.rows.prefix.shape[1]
    task = self._task(self.rows)
    engine = self.engine or engines.default_engine(task.rule, task.batch_size)
    self.bound = engine(task)

  def _task(self, rows: Rows) -> engines.Task:
    """The rule at work on rows, whose prefixes do not exit."""
    rule = self.rule
    given = (rows.encoded, rows.threshold, self.length)
    if isinstance(rule, exits.DynamicExits):
      schedule = AfterPrefix(rule.schedule, rows)
      rule = dataclasses.replace(rule, schedule=schedule)
    return engines.Task(self.config, rule, self.weights, *given)

  def empty_cache(self, batch_size: int) -> dict[str, Any]:
    """A cache that T5X's loops can tile, flatten and gather: dictionaries.

    `batch_size` is the rows of the batch, before a loop multiplies them.
    """

    def cut(x):
      return x[:batch_size] if x.ndim else x

    empty = jax.tree.map(cut, self.bound.empty)
    return _to_loop(jnp.zeros((), jnp.int32), empty)

  def __call__(self, state: Any) -> tuple[jax.Array, dict[str, Any]]:
    """T5X's "tokens to logits": one position of its `DecodingState`, and the
    cache after it."""
    cache = state.cache
    token = state.cur_token[:, 0]
    structure = jax.tree.structure(self.bound.empty)
    carried = jax.tree.unflatten(structure, jax.tree.leaves(cache["carried"]))
    position = cache["cache_index"]
    active = jnp.all(state.sequences != self.eos_id, axis=1)
    made, carried = self.bound.take_step(token, position, active, carried)
    beyond = ((0, 0), (0, self.config.vocab_size - made.logits.shape[1]))
    bias = layers.MASK_BIAS
    logits = jnp.pad(made.logits, beyond, constant_values=bias)
    return logits, _to_loop(position + 1, carried)

  def step_with_prefix(self, current, position, active, cache):
    """A `loop.Step` that emits the prefix, which has no exits and no score."""
    made, cache = self.bound.take_step(current, position, active, cache)
    prefix = _at(self.rows.prefix, position)
    best = made.best

    def free(x):
      return jnp.where(prefix == 0, x, jnp.zeros_like(x))

    token = jnp.where(prefix == 0, best.token, prefix)
    made = dataclasses.replace(
      made,
      exit_layer=free(made.exit_layer),
      confidence=free(made.confidence),
      rejected_confidence=free(made.rejected_confidence),
      greedy=layers_lib.Greedy(token, free(best.log_probability)),
    )
    return made, cache

  def exits_of(
    self,
    decodes: Int[Array, "batch decodes length"],
    made: loop.Generation | None = None,
  ) -> dict[str, jax.Array]:
    """Exits of decodes, each of their shape: 0 of prefixes and padding; `made`
    is of the pass that decoded, where the loop returned it."""
    found = self.replay(decodes) if made is None else vars(made)
    static = isinstance(self.rule, exits.StaticExit)
    names = ("exit_layers", *(() if static else MEASURED))
    return {name: found[name].reshape(decodes.shape) for name in names}

  def replay(
    self, decodes: Int[Array, "batch decodes length"]
  ) -> dict[str, jax.Array]:
    """Exits of what some loop returned, in one teacher-forced pass: all
    positions of a sequence go up the layers together."""
    length = decodes.shape[-1]  # beam search may be told to stop earlier
    tokens = decodes.reshape(-1, length)
    tokens = jnp.pad(tokens, ((0, 0), (0, self.length - length)))
    # A loop may go on with a row that it has ended.
    real = real_tokens(tokens, self.eos_id)
    counted = real & (self.rows.prefix == 0)
    if isinstance(self.rule, exits.StaticExit):
      depth = self.rule.depth(self.config.num_decoder_layers)
      found = {"exit_layers": jnp.full_like(tokens, depth)}
    elif isinstance(self.rule, exits.DynamicExits):
      inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
      rows = (self.rows, inputs, real)
      # Of a mesh, or of a symbolic number, they are not taken one by one.
      one_by_one = self.engine is not engines.Eager
      if one_by_one:
        single = jax.tree.map(lambda x: x[:, None], rows)
        found = lax.map(self._go_up, single)
        found = jax.tree.map(lambda x: x[:, 0], found)
      else:
        found = self._go_up(rows)
    else:
      raise ValueError(
        "Expected a rule exits.DynamicExits with T5X's loops, got"
        f" {type(self.rule).__name__}; bind decode_fn = @models.greedy_decode."
      )

    def blank(x):
      return jnp.where(counted, x, jnp.zeros_like(x))[:, :length]

    return jax.tree.map(blank, found)

  def _go_up(self, given: tuple[Rows, jax.Array, jax.Array]):
    """Exits of every position of rows (what is known, inputs, real tokens)."""
    rows, inputs, real = given

    def flat(x):
      return x.reshape(-1, 1)

    threshold = jnp.repeat(rows.threshold, self.length)
    each = (flat(rows.prefix), flat(rows.generated), threshold)
    task = self._task(Rows(rows.encoded, *each))
    bound = engines.Eager(task)
    position = jnp.zeros((), jnp.int32)
    decoder = bound.decoder(position)
    rule: Any = task.rule  # of dynamic exits, which was asked before
    walk = rule.walk(decoder.layers(()), threshold, position)
    state = walk_lib.start(task.embed(inputs.reshape(-1)), real.reshape(-1))
    biases = bound.table.of_windows(position[None], self.length)
    for layer in range(1, self.config.num_decoder_layers + 1):
      hidden = walk.layer_input(layer, state)
      row = walk.stored(layer, state, decoder.project(layer, hidden))

      def window(x):
        return attention.by_window(x, task.batch_size)

      cache = caches.Cache(window(row.key), window(row.value))
      attends = decoder.window_attention(layer, hidden, cache, biases)
      hidden = decoder.run_projected(layer, hidden, row, attends)
      state = walk.after(layer, state, hidden, row)
    found = (state.exit_layer, state.confidence, state.rejected_confidence)
    shaped = [x.reshape(inputs.shape) for x in found]
    return dict(zip(("exit_layers", *MEASURED), shaped, strict=True))


def _to_loop(position: jax.Array, carried: Any) -> dict[str, Any]:
  """T5X knows leaves without a row axis by their name, `cache_index`."""

  def name(leaf):
    return "per_row" if leaf.ndim else "cache_index"

  leaves = enumerate(jax.tree.leaves(carried))
  # So wide that the names have the leaves' order.
  named = {f"{i:04}": {name(leaf): leaf} for i, leaf in leaves}
  return {"cache_index": position, "carried": named}


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
  cache: dict[str, Any],
  tokens_to_logits: Loop,
  eos_id: int,
  num_decodes: int = 1,
  decode_rng: Any = None,
  cache_offset: int = 0,
) -> tuple[jax.Array, jax.Array, loop.Generation]:
  """Greedy decoding with its exits from the same pass: a T5X `decode_fn`, the
  loop of `calm infer`. `tokens_to_logits` knows the prefix.

  Returns:
    Tokens [batch, 1, length], scores [batch, 1] (log-probabilities under the
    full head at the exit layers, nats), and the generation that they are of.
  """
  del cache, decode_rng, cache_offset
  if num_decodes != 1:
    raise ValueError(
      f"Expected `num_decodes` of 1 for greedy decoding, got {num_decodes}; use"
      " T5X's `decoding.temperature_sample` or `decoding.beam_search`."
    )
  made = loop.decode(
    tokens_to_logits.step_with_prefix,
    tokens_to_logits.bound.empty,
    active=jnp.ones(inputs.shape[:1], bool),
    max_decode_length=inputs.shape[1],
    eos_id=eos_id,
  ).generation
  tokens = jnp.asarray(made.tokens)
  scores = jnp.asarray(made.scores)
  return tokens[:, None], scores[:, None], made


def row_axes(mesh: Any, num_rows: Any) -> tuple[str, ...]:
  """The axes of a mesh that rows are split along: all, its data axes, or none;
  a symbolic `num_rows` (`jax.export`) is never split."""
  every = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
  for axes in (every, tuple(name for name in every if name in DATA_AXES)):
    size = math.prod(mesh.shape[name] for name in axes)
    if axes and isinstance(num_rows, int) and num_rows % size == 0:
      return axes
  return ()


def kept_whole(variables: Any) -> Any:
  """Variables of a model whose decoder every device is to keep whole: its axes
  in 'params_axes' are renamed to "kv", which T5X's rules lay along no mesh
  axis, and which its Adafactor factors as those that it replaces."""

  def renamed(names):
    return ("kv" if n in _ALONG_MODEL else n for n in names)

  def rename(axes):
    return axes.replace(names=sharding.PartitionSpec(*renamed(axes.names)))

  def is_axes(x):
    return isinstance(x, partitioning.AxisMetadata)

  axes = dict(variables["params_axes"])
  for part in ("token_embedder", "decoder"):  # which decode loops read
    axes[part] = jax.tree.map(rename, axes[part], is_leaf=is_axes)
  axes = type(variables["params_axes"])(axes)
  return type(variables)({**variables, "params_axes": axes})


def over_rows(
  function: Callable[[Any, Any, Any], Any], mesh: Any, axes: tuple[str, ...]
) -> Callable[[Any, Any, Any], Any]:
  """`function`(shared, rows, rng), each device with its own rows and key.

  `rows` and what it returns are trees of arrays [rows, ...], split along `axes`
  (from `row_axes`); every device sees the tree `shared` whole, and ends a loop
  of its own: loops with collectives inside would wait for each other.
  """
  if not axes:
    return function

  def local(shared, rows, rng):
    if rng is not None:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(axes))
    return function(shared, rows, rng)

  every = sharding.PartitionSpec()
  split = sharding.PartitionSpec(axes)
  # Not checked: a `while_loop` whose number of turns varies over devices is
  # what this is for, and the check takes constants in its carry for unvarying.
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(every, split, every),
    out_specs=split,
    check_vma=False,
  )
