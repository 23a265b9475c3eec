"""The compiled programs of inference: encode a batch once, decode it at any threshold.

Static things (sizes, rule, lengths) live in the frozen `Program`; the threshold is traced, so
that a whole grid compiles once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.decode import acceptance, compiled, engines, loop, speculative
from calm.t5 import caches, decoder_weights, eight_bits, network
from calm.t5.network import Params

State = loop.DecodingState | speculative.SpeculativeState


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
) -> ModelWeights:
  """Lays a T5X-shaped tree out for inference.

  Args:
    params: the tree.
    config: its sizes.
    num_pieces: pieces of the vocabulary; rows beyond them are never emitted. None: all rows.
    shortlist: likely token ids, for the measure 'shortlist'; None: no such head.
    weights_dtype: what matrices and heads are rounded to and stored in; None: the encoder's
      as they are, the decoder's in the activation dtype, heads in float32. 'int8' multiplies
      the layers of both in 8 bits and leaves the rest as None does.
    head_dtype: 'int8' reads heads in 8 bits first; None: as they are stored.
    encoder_dtype: 'int8' multiplies the encoder's layers in 8 bits, and its states with what
      makes the decoder's keys and values of them; None: as `weights_dtype`.

  Raises:
    ValueError: `num_pieces` or `shortlist` does not fit the model.
  """
  encoder = {name: params[name] for name in ("token_embedder", "encoder")}
  encoder_dtype = encoder_dtype or weights_dtype
  return ModelWeights(
    jax.tree_util.tree_map_with_path(
      lambda path, leaf: _stored(path[-1].key, jnp.asarray(leaf), encoder_dtype), encoder
    ),
    decoder_weights.decoder_weights(
      params, config, num_pieces, shortlist, weights_dtype, head_dtype, encoder_dtype
    ),
  )


def _stored(name: str, leaf: jax.Array, dtype: str | None) -> jax.Array | eight_bits.EightBits:
  """A parameter of the encoder as it is read."""
  if dtype == "int8":
    return eight_bits.quantize(leaf).for_many_rows() if name == "kernel" else leaf
  # Scales of norms are vectors, and few; they stay.
  return leaf if dtype is None or leaf.ndim < 2 else leaf.astype(jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Program:
  """One way of decoding; hashable, and compiled once for every batch shape.

  Attributes:
    config: the model's sizes.
    rule: how a token goes through the layers.
    max_decode_length: most tokens generated a prompt.
    eos_id: the token that ends a row.
    engine: how the loop's steps run; the results do not depend on it. None takes the fastest
      for the rule, the rows and the platform (`default_engine`).
    native: see `engines.Task`.
    room: positions of the caches, where a longer stage goes on after these; None: all.
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

  @compiled.method()
  def encode(
    self, weights: ModelWeights, encoder_input_tokens: Int[Array, "batch input_length"]
  ) -> caches.Encoded:
    """Encoder states' cross-attention keys and values; for any number of decodings."""
    encoded = network.encode(weights.encoder, self.config, encoder_input_tokens)
    return caches.cross_attention_inputs(
      weights.decoder, self.config, encoded, encoder_input_tokens
    )

  def decode_state(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
    prior: acceptance.Prior | None = None,
  ) -> State:
    """Decodes greedily and returns the final state, caches filled (not compiled)."""
    if isinstance(self.rule, exits.Speculative):
      return self.speculation(weights, encoded, threshold, prior).decode(active)
    bound = self.bind(weights.decoder, encoded, threshold)
    state = self._loop(bound, active)
    return dataclasses.replace(state, cache=bound.flush(state.cache, state.position))

  def _loop(self, bound: engines.Bound, active: Bool[Array, " batch"]) -> loop.DecodingState:
    return loop.decode(
      bound.take_step,
      bound.empty,
      active=active,
      max_decode_length=self.max_decode_length,
      step_limit=self.room,
      eos_id=self.eos_id,
    )

  @compiled.method()
  def begin(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
    prior: acceptance.Prior | None = None,
  ) -> State:
    """Decodes from the first token up to this stage's `room`; passes over drafts that begin in
    a stage may end in the next one's positions."""
    if isinstance(self.rule, exits.Speculative):
      made = self.speculation(weights, encoded, threshold, prior)
      return made.finish(made.go_on(made.begin(active), self.length))
    return self._loop(self.bind(weights.decoder, encoded, threshold), active)

  @compiled.method()
  def start(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
  ) -> loop.DecodingState:
    """What `go_on` decodes the first tokens from; not of `exits.Speculative`."""
    bound = self.bind(weights.decoder, encoded, threshold)
    return loop.nothing_yet(active, self.max_decode_length, bound.empty)

  @compiled.method()
  def go_on(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    state: State,
    threshold: Float[Array, "..."],
    limit: Int[Array, ""] | None = None,
  ) -> State:
    """Decodes the rows that a shorter stage has not ended, or that `limit` positions ended:
    it is traced, so that a text may come in parts of any length."""
    if isinstance(state, speculative.SpeculativeState):
      made = self.speculation(weights, encoded, threshold)
      room = speculative.cache_length(made.rule, self.length)
      state = dataclasses.replace(state, cache=engines.grown(state.cache, room))
      return made.finish(made.go_on(state, self.length))
    bound = self.bind(weights.decoder, encoded, threshold)
    return loop.go_on(
      bound.take_step,
      state,
      bound.grow(state.cache),
      step_limit=self.length if limit is None else limit,
      eos_id=self.eos_id,
    )

  @compiled.method()
  def decode(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
    prior: acceptance.Prior | None = None,
  ) -> loop.Generation:
    """Decodes greedily.

    Args:
      weights, encoded: the model, and prompts from `encode`.
      active: rows that hold a prompt; the others are padding of the batch.
      threshold: lambda, [] or one a row; `schedules.NEVER_EXIT` runs every layer.
      prior: of `exits.Speculative`: what is expected of a text's drafts, on which no text
        depends; None: nothing is known.
    """
    return self.decode_state(weights, encoded, active, threshold, prior).generation

  @compiled.method()
  def decode_packed(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    active: Bool[Array, " batch"],
    known: Float[Array, " one_or_four"],
  ) -> Int[Array, "batch columns"]:
    """`decode`, with one array to send, the threshold and the prior's three numbers if there is
    one, and one that comes back (`loop.unpack`)."""
    threshold, *prior = known
    state = self.decode_state(weights, encoded, active, threshold, tuple(prior) or None)
    return loop.pack(state.generation)

  def speculation(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    threshold: Float[Array, "..."],
    prior: acceptance.Prior | None = None,
  ) -> speculative.Speculation:
    """The loop of `exits.Speculative` at work on these prompts."""
    assert isinstance(self.rule, exits.Speculative)
    task = self._task(weights.decoder, encoded, threshold)
    made = speculative.bind(task, self.rule, self.eos_id, self.max_decode_length)
    return made if prior is None else dataclasses.replace(made, prior=prior)

  def nothing_yet(self, batch_size: int) -> loop.DecodingState:
    """What `resume` starts from where nothing was decoded yet."""
    depth = self.rule.depth(self.config.num_decoder_layers)
    cache = caches.empty_caches(self.config, batch_size, self.length, depth)
    active = jnp.zeros((batch_size,), bool)
    return loop.nothing_yet(active, self.max_decode_length, cache)

  @compiled.method()
  def resume(
    self,
    weights: ModelWeights,
    encoded: caches.Encoded,
    state: loop.DecodingState,
    active: Bool[Array, " batch"],
    threshold: Float[Array, "..."],
    resume_at: Int[Array, " batch"],
  ) -> loop.DecodingState:
    """Decodes again from some token of each row on (`grid.reusable_tokens` says from which).

    Args:
      weights, encoded, threshold: as for `decode`.
      state: from `resume` or `nothing_yet`, of the same prompts; its generation may have room
        for more tokens than its caches and this program.
      active: rows to decode; the others stay as they are in `state`.
      resume_at: the first token of each row that may differ from `state`.
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
    return dataclasses.replace(made, cache=bound.flush(made.cache, made.position))

  def bind(
    self,
    weights: decoder_weights.DecoderWeights,
    encoded: caches.Encoded,
    threshold: jax.Array,
    kept: jax.Array | None = None,
  ) -> engines.Bound:
    """The engine at work on these prompts at this threshold; `kept` as in `engines.Task`."""
    task = self._task(weights, encoded, threshold, kept)
    return engines.bind(task, self.engine)

  def _task(self, weights, encoded, threshold, kept=None) -> engines.Task:
    native = self.native
    return engines.Task(
      self.config, self.rule, weights, encoded, threshold, self.length, kept, native=native
    )
