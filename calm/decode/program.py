"""The compiled programs of inference: encode a batch once, decode it at any
threshold, which is traced. Long limits are reached in stages, since a step's
attention reads every position of the caches: of 64 positions, then of four
times as many, up to the limit.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import compiled, engines, loop, speculative
from calm.t5 import (
  attention,
  caches,
  decoder_weights,
  eight_bits,
  network,
  platforms,
)
from calm.t5.network import Params

State = loop.DecodingState | speculative.SpeculativeState
# Positions of the first stage, and how many times as many the next one has.
FIRST = 64
RATIO = 4


@struct.dataclass
class ModelWeights:
  """A model as inference holds it."""

  encoder: Params  # the T5X-shaped tree's embedding and encoder
  decoder: decoder_weights.DecoderWeights  # laid out for decoding


def model_weights(
  params: Params,
  config: network.T5Config,
  num_pieces: int | None = None,
  shortlist: Sequence[int] | None = None,
  weights_dtype: str | None = None,
  head_dtype: str | None = None,
  encoder_dtype: str | None = None,
  native: bool = False,
) -> ModelWeights:
  """Lays a T5X-shaped tree out for inference.

  Args:
    params, config: the tree and its sizes.
    num_pieces: pieces of the vocabulary; rows beyond them are never emitted.
      None: all rows.
    shortlist: likely token ids, for the measure 'shortlist'; None: no such
      head.
    weights_dtype: what matrices and heads are rounded to and stored in; None:
      the encoder's as they are, the decoder's in the activation dtype, heads in
      float32. 'int8' rounds matrices of the decoder's layers and its head to 8
      bits, and the rest as None does.
    head_dtype: 'int8' reads heads in 8 bits first (CPU, llvmlite); None: as
      `weights_dtype`.
    encoder_dtype: 'int8' multiplies the encoder's layers in 8 bits, and its
      states with what makes the decoder's keys and values of them; None: as
      `weights_dtype`.
    native: whether float32 matrices of the decoder lie as kernels read them,
      for programs that are `native`.

  Raises:
    ValueError: `num_pieces` or `shortlist` does not fit the model.
  """
  encoder = {name: params[name] for name in ("token_embedder", "encoder")}
  encoder_dtype = encoder_dtype or weights_dtype
  return ModelWeights(
    jax.tree_util.tree_map_with_path(
      lambda path, leaf: _stored(
        path[-1].key, jnp.asarray(leaf), encoder_dtype
      ),
      encoder,
    ),
    decoder_weights.decoder_weights(
      params,
      config,
      num_pieces,
      shortlist,
      weights_dtype,
      head_dtype,
      encoder_dtype,
      native,
    ),
  )


def _stored(
  name: str, leaf: jax.Array, dtype: str | None
) -> jax.Array | eight_bits.EightBits:
  """A parameter of the encoder as it is read."""
  if dtype == "int8":
    return eight_bits.quantize(leaf, tiled=True) if name == "kernel" else leaf
  # Scales of norms are vectors, and few; they stay.
  return (
    leaf if dtype is None or leaf.ndim < 2 else leaf.astype(jnp.dtype(dtype))
  )


def fetch(made: loop.Generation) -> loop.Generation:
  """A generation of numpy arrays."""
  # Where host and device are one, nothing is to be sent for ahead, and asking
  # takes a core from the program: a twentieth of a short text of a small model.
  here = platforms.is_cpu()
  return jax.tree.map(np.asarray, made) if here else jax.device_get(made)


def stage_lengths(max_decode_length: int) -> tuple[int, ...]:
  """Positions of every stage, ascending; the last has those of the limit.

  A stage that would hold more than half of the limit is left out: it saves
  little.
  """
  stages = []
  length = FIRST
  while 2 * length <= max_decode_length:
    stages.append(length)
    length *= RATIO
  return (*stages, max_decode_length)


@dataclasses.dataclass(frozen=True)
class Program:
  """One way of decoding; hashable, and compiled once for every batch shape.

  `weights` of its methods are from `model_weights`, `encoded` are prompts from
  `encode`, `active` [batch] are rows that hold a prompt (the others are padding
  of the batch), and `threshold` is lambda, [] or one a row;
  `schedules.NEVER_EXIT` runs every layer.

  Attributes:
    config: the model's sizes.
    rule: how a token goes through the layers.
    max_decode_length: most tokens generated a prompt.
    eos_id: the token that ends a row.
    engine: how the loop's steps run; the results do not depend on it. None
      takes the fastest for the rule, the rows and the platform
      (`default_engine`).
    native: see `engines.Task`.
    room: positions of the caches, where a longer stage goes on after these;
      None: all.
  """

  config: network.T5Config
  rule: exits.Rule
  max_decode_length: int
  eos_id: int = 1
  engine: engines.Engine | None = None
  native: bool = True
  room: int | None = None

  @property
  def length(self) -> int:
    """Positions that this program decodes."""
    return self.room or self.max_decode_length

  @property
  def stages(self) -> "tuple[Program, ...]":
    """Programs of ascending room, of which a text runs as many as it needs; on
    a CPU.
    """
    rooms = stage_lengths(self.max_decode_length)
    # Other shapes would round otherwise where states have few bits, which runs
    # nothing native.
    if len(rooms) == 1 or not self.native or not platforms.is_cpu():
      return (self,)
    return tuple(dataclasses.replace(self, room=room) for room in rooms)

  # ---- What is compiled

  @compiled.Method
  def encode(
    self,
    weights: ModelWeights,
    tokens: Int[Array, "batch input_length"],
    packed: network.Packed | None = None,
  ) -> caches.Encoded:
    """Encoder states' cross-attention keys and values; for any number of
    decodings.
    """
    states = network.encode(weights.encoder, self.config, tokens, packed)
    return caches.cross_attention_inputs(
      weights.decoder, self.config, states, tokens, packed
    )

  @compiled.Method
  def decode(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
  ) -> loop.Generation:
    """Decodes greedily."""
    return self.decode_state(weights, encoded, active, threshold).generation

  @compiled.Method
  def decode_packed(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
  ) -> Int[Array, "batch columns"]:
    """`decode`, with one array that comes back (`loop.unpack`)."""
    return loop.pack(
      self.decode_state(weights, encoded, active, threshold).generation
    )

  @compiled.Method
  def start(self, weights, encoded, active, threshold) -> State:
    """What `go_on` decodes the first tokens from."""
    if isinstance(self.rule, exits.Speculative):
      return self.speculation(weights, encoded, threshold).begin(active)
    bound = self.bind(weights.decoder, encoded, threshold)
    return loop.nothing_yet(active, self.max_decode_length, bound.empty)

  @compiled.Method
  def go_on(
    self, weights, encoded, state: State, threshold, limit=None
  ) -> State:
    """Decodes the rows that have not ended up to this stage's `room`, or
    `limit` positions [], which is traced, so that a text may come in parts of
    any length; passes over drafts that begin in a stage may end in the next
    one's positions.
    """
    if isinstance(state, speculative.SpeculativeState):
      made = self.speculation(weights, encoded, threshold)
      state = dataclasses.replace(
        state, cache=engines.grown(state.cache, made.task.length)
      )
      return made.go_on(state, self.length)
    bound = self.bind(weights.decoder, encoded, threshold)
    return loop.go_on(
      bound.take_step,
      state,
      engines.grown(state.cache, self.length),
      step_limit=self.length if limit is None else limit,
      eos_id=self.eos_id,
    )

  @compiled.Method
  def resume(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    state: loop.DecodingState,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
    resume_at: Int[Array, " batch"],
  ) -> loop.DecodingState:
    """Decodes again from `resume_at`, the first token of each row that may
    differ from `state` (`grid.reusable_tokens`). That is from `resume` or
    `nothing_yet`, of the same prompts, with room for as many tokens or more;
    rows that are not `active` stay as they are in it.
    """
    kept = jnp.where(active, resume_at, self.length)
    bound = self.bind(weights.decoder, encoded, threshold, kept)
    made = loop.resume(
      bound.take_step,
      state,
      bound.resume(state.cache, jnp.min(kept).astype(jnp.int32)),
      active=active,
      resume_at=resume_at,
      step_limit=self.length,
      eos_id=self.eos_id,
    )
    return dataclasses.replace(
      made, cache=bound.flush(made.cache, made.position)
    )

  # ---- What runs it, in stages

  def generate(self, weights, encoded, active, threshold) -> loop.Generation:
    """As `decode`, in as many stages as the rows need, fetched to the host."""
    # Numpy values go to the device inside the call: a tenth of a millisecond
    # less a batch.
    stages, threshold = self.stages, np.asarray(threshold, np.float32)
    if len(stages) == 1:
      made = np.asarray(self.decode_packed(weights, encoded, active, threshold))
      return loop.unpack(made, self.max_decode_length)
    state = stages[0].start(weights, encoded, active, threshold)
    for stage in stages:
      if not np.any(state.active):
        break
      state = stage.go_on(weights, encoded, state, threshold)
    return fetch(state.generation)

  def regenerate(
    self,
    weights,
    encoded,
    reached: loop.DecodingState | None,
    active,
    threshold,
    resume_at,
  ) -> loop.DecodingState:
    """As `resume`, in the stage that `reached` (None: nothing yet) is in and
    those that rows need.
    """
    state = (
      self.stages[0].nothing_yet(len(active)) if reached is None else reached
    )
    length = caches.length(state.cache)
    for stage in (stage for stage in self.stages if stage.length >= length):
      if stage.length > caches.length(state.cache):
        state = dataclasses.replace(
          state, cache=engines.grown(state.cache, stage.length)
        )
      state = stage.resume(
        weights, encoded, state, active, threshold, resume_at
      )
      active = np.asarray(state.active)
      if not active.any():
        break
      # Rows that have not ended go on where the stage did.
      resume_at = np.maximum(resume_at, stage.length).astype(np.int32)
    return state

  # ---- Its parts

  def decode_state(self, weights, encoded, active, threshold) -> State:
    """Decodes greedily and returns the final state, caches filled (not
    compiled).
    """
    if isinstance(self.rule, exits.Speculative):
      made = self.speculation(weights, encoded, threshold)
      return made.go_on(made.begin(active), self.length)
    bound = self.bind(weights.decoder, encoded, threshold)
    state = loop.decode(
      bound.take_step,
      bound.empty,
      active=active,
      max_decode_length=self.max_decode_length,
      step_limit=self.room,
      eos_id=self.eos_id,
    )
    return dataclasses.replace(
      state, cache=bound.flush(state.cache, state.position)
    )

  def nothing_yet(self, batch_size: int) -> loop.DecodingState:
    """What `resume` starts from where nothing was decoded yet."""
    depth = self.rule.depth(self.config.num_decoder_layers)
    cache = caches.empty_caches(self.config, batch_size, self.length, depth)
    active = jnp.zeros((batch_size,), bool)
    return loop.nothing_yet(active, self.max_decode_length, cache)

  def speculation(self, weights, encoded, threshold) -> speculative.Speculation:
    """The loop of `exits.Speculative` at work on these prompts; ValueError
    where the rule does not fit the model, or wants a shortlist that it has not.
    """
    rule = self.rule
    config = self.config
    decoder = weights.decoder
    assert isinstance(rule, exits.Speculative)
    rule.depth(config.num_decoder_layers)
    if (
      rule.draft_layer
      and rule.draft_head == "shortlist"
      and decoder.shortlist is None
    ):
      raise ValueError(
        "Expected a model with a shortlist of likely tokens for `draft_head` "
        "'shortlist', got"
        " none; give `shortlist` (token ids), or use `draft_head='full'`."
      )
    if not rule.draft_layer:  # without slack
      threshold = jnp.ones_like(threshold)
    task = self._task(decoder, encoded, threshold)
    roomy = dataclasses.replace(task, length=self.length + rule.window)
    table = attention.bias_table(task.weights, config, roomy.length)
    return speculative.Speculation(
      roomy, table, rule, self.max_decode_length, self.eos_id
    )

  def bind(
    self, weights: decoder_weights.DecoderWeights, encoded, threshold, kept=None
  ) -> engines.Eager:
    """The engine at work on these prompts at this threshold; `kept` as in
    `engines.Task`.
    """
    task = self._task(weights, encoded, threshold, kept)
    return (self.engine or engines.default_engine(task.rule, task.batch_size))(
      task
    )

  def _task(self, weights, encoded, threshold, kept=None) -> engines.Task:
    sizes = self.length, kept, self.native
    return engines.Task(
      self.config, self.rule, weights, encoded, threshold, *sizes
    )
