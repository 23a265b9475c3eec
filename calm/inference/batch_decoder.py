"""A model under its decoding options: encodes and decodes batches of prompts."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from calm import checkpoints, exits, signals
from calm.calibrate import Procedure
from calm.data import prompt_batches, prompt_files
from calm.decode import acceptance, compiled, loop, pool, staged
from calm.decode import program as program_lib
from calm.decode import sharded as sharded_lib
from calm.exits import schedules
from calm.inference import options as options_lib
from calm.inference import outputs
from calm.t5 import caches, costs, network, parameters, platforms

Decoder = TypeVar("Decoder", bound="BatchDecoder")
# Options that the layout of the weights depends on.
_LAYOUT = ("num_devices", "weights_dtype", "encoder_dtype", "head_dtype")


@dataclasses.dataclass(frozen=True, eq=False)
class BatchDecoder:
  """A model ready to decode batches.

  Attributes:
    config: the model's sizes.
    params: its T5X-shaped parameter tree.
    vocabulary: text <-> ids.
    options: how prompts are decoded.
    one_shape: whether every batch is padded to one shape, so that a rule is one compiled
      program: many rules over few prompts are compiled for longer than they run.
  """

  config: network.T5Config
  params: Mapping[str, Any] = dataclasses.field(repr=False)
  vocabulary: Any = dataclasses.field(repr=False)
  options: options_lib.DecodeOptions
  one_shape: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self):
    # Full depth asks for no exits, and would pass over measures and layers that are none.
    self.options.rule.depth(self.num_layers)
    exits.allowed_layers(self.options.exit_layers, self.num_layers)
    exits.mapped_layers(self.options.rule, self.num_layers, self.config.exit_propagation)

  @functools.cached_property
  def weights(self) -> program_lib.ModelWeights:
    """The parameters laid out for decoding."""
    options = self.options
    weights = program_lib.model_weights(
      self.params,
      self.config,
      self.vocabulary.vocab_size,
      self.options.shortlist,
      options.weights_dtype,
      options.head_dtype,
      encoder_dtype=options.encoder_dtype,
    )
    return sharded_lib.replicate(weights, options.num_devices)

  @functools.cached_property
  def parameters_digest(self) -> str:
    return checkpoints.parameters_digest(self.params)

  @functools.cached_property
  def base_digest(self) -> str | None:
    """Of the parameters that full-depth texts depend on, where exits have maps beside them."""
    maps = self.config.exit_translators or self.config.exit_propagation
    return parameters.base_digest(self.params) if maps else None

  @functools.cached_property
  def expected_drafts(self) -> dict[tuple[exits.Rule, float], acceptance.History]:
    """What drafts of the texts so far were worth, by rule and threshold."""
    return {}

  @property
  def eos_id(self) -> int:
    eos_id = self.vocabulary.eos_id
    return 1 if eos_id is None else eos_id

  @property
  def num_layers(self) -> int:
    """Decoder layers."""
    return self.config.num_decoder_layers

  @property
  def procedure(self) -> Procedure:
    """The procedure for which a calibration of this model's outputs is valid."""
    return options_lib.procedure(self)

  def with_options(self: Decoder, **options: Any) -> Decoder:
    """The same model under other options."""
    changed = options_lib.change(self.config, self.options, **options)
    return self.sharing(dataclasses.replace(self, options=changed))

  def with_exits(self: Decoder, file: str | pathlib.Path) -> Decoder:
    """The same model with the exits of a file that `calm fit` learned beside its weights.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: they were learned beside other weights.
    """
    config, params = checkpoints.with_exits(self.config, self.params, file)
    return dataclasses.replace(self, config=config, params=params)

  def sharing(self, other: Decoder) -> Decoder:
    """`other`, a model of the same parameters, with the digests and weights of this one."""
    layouts = [
      (
        [getattr(model.options, name) for name in _LAYOUT],
        model.options.shortlist,
        model.config,
      )
      for model in (self, other)
    ]
    names = ("parameters_digest", "base_digest", "weights")
    for name in names if layouts[0] == layouts[1] else names[:2]:
      if name in self.__dict__:
        other.__dict__[name] = self.__dict__[name]
    return other

  @property
  def reference(self: Decoder) -> Decoder:
    """The model that writes the texts of full depth which a promise compares with.

    Under a `reference_dtype` it is the same parameters with states and weights in float32, laid
    out a second time where these options have others; else the model itself.
    """
    options = self.options
    approximates = options_lib.batch_size_affects_output(self.config, options) or (
      options.weights_dtype not in (None, options.reference_dtype)
    )
    apart = options.reference_dtype is not None and approximates
    return self._reference if apart else self

  @functools.cached_property
  def _reference(self: Decoder) -> Decoder:
    config = dataclasses.replace(self.config, dtype=self.options.reference_dtype)
    plain = self.with_options(weights_dtype=None, encoder_dtype=None, reference_dtype=None)
    return self.sharing(dataclasses.replace(plain, config=config))

  # ---- Programs

  def program(self, rule: exits.Rule | None = None) -> program_lib.Program:
    """The compiled program of a rule (the options' own by default)."""
    return program_lib.Program(
      self.config,
      rule or self.options.rule,
      self.options.max_decode_length,
      self.eos_id,
      self.options.engine if rule is None else None,
      native=not options_lib.decoder_rounds(self.config, self.options),
    )

  def runs(self, rule: exits.Rule | None = None) -> Any:
    """What `decode` runs: `program`, spread over devices, or in stages where last bits decide
    nothing."""
    program, count = self.program(rule), self.options.num_devices
    if count > 1:
      return sharded_lib.ShardedProgram(program, count)
    rounds = options_lib.decoder_rounds(self.config, self.options)
    return program if rounds else staged.staged(program)

  # ---- Batches

  def plan(self, texts: Sequence[str]) -> list[prompt_batches.PromptBatch]:
    """Tokenises prompts and groups them into batches."""
    size, length = self.options.batch_size, self.options.max_input_length
    size *= self.options.num_devices
    tokens = prompt_batches.tokenize(
      prompt_files.check_texts(texts),
      self.vocabulary,
      prefix=self.options.task_prefix,
      max_input_length=length,
      eos_id=self.eos_id,
    )
    batches = prompt_batches.plan(
      tokens,
      batch_size=size,
      max_input_length=length,
      # The size is part of the procedure there: another one rounds otherwise.
      whole_batches=options_lib.batch_size_affects_output(self.config, self.options),
    )
    return [_padded(batch, size, length) for batch in batches] if self.one_shape else batches

  def encode(self, batch: prompt_batches.PromptBatch) -> caches.Encoded:
    """Encodes a batch once, for any number of thresholds."""
    signals.check()
    # The rule has no part in it: one compiled encoder serves all of them.
    program = program_lib.Program(self.config, exits.StaticExit(), 1, self.eos_id)
    count = self.options.num_devices
    encoder = program if count == 1 else sharded_lib.ShardedProgram(program, count)
    with compiled.at_precision(self.options.matmul_precision):
      return encoder.encode(self.weights, batch.tokens)

  def decode(
    self,
    encoded: caches.Encoded,
    active: np.ndarray,
    threshold: float,
    rule: exits.Rule | None = None,
  ) -> loop.Generation:
    """Decodes the active rows of an encoded batch; numpy arrays come back."""
    signals.check()
    chosen = rule or self.options.rule
    if not isinstance(chosen, exits.Speculative):
      return self._run(rule, encoded, active, threshold)
    # Drafts decide something, or full depth would round otherwise than passes do.
    must = threshold < 1 or not chosen.adapts or chosen.measures or not can_be_exact(self)
    history = self.expected_drafts.setdefault((chosen, threshold), acceptance.History(must))
    history.update_from_last()
    if len(active) not in history.plans:
      each = -(-len(active) // self.options.num_devices)
      weights, native = self.weights.decoder, self.program(chosen).native
      history.plans[len(active)] = acceptance.plan(self.config, weights, chosen, each, native)
    if not history.drafts_next(len(active)):
      full = self._run(exits.StaticExit(), encoded, active, schedules.NEVER_EXIT)
      return loop.without_drafts(full)
    generation = self._run(chosen, encoded, active, threshold, history.prior)
    history.last = generation, active
    return generation

  def expect_drafts(self) -> None:
    """The next batch makes drafts, whatever those before it were worth: to time them."""
    for history in self.expected_drafts.values():
      history.update_from_last()
      history.backoff = 0

  def _run(
    self, rule, encoded, active, threshold: float, prior: acceptance.Prior | None = None
  ) -> loop.Generation:
    """One batch through the program of a rule, fetched to the host."""
    # Arguments are looked at one by one, 40 microseconds for those of the encoder.
    weights = dataclasses.replace(self.weights, encoder={})
    program = self.runs(rule)
    # Numpy values go to the device inside the call: a tenth of a millisecond less a batch.
    with compiled.at_precision(self.options.matmul_precision):
      if isinstance(program, program_lib.Program):
        known = np.array((threshold, *(prior or ())), np.float32)
        generation = np.asarray(program.decode_packed(weights, encoded, active, known))
        return loop.unpack(generation, program.max_decode_length)
      level, expected = jax.tree.map(np.float32, (threshold, prior))
      generation = program.decode(weights, encoded, active, level, expected)
    # Where host and device are one, nothing is to be sent for ahead, and asking takes a core
    # from the program: a twentieth of a short text of a small model.
    if platforms.runs_in_this_process():
      return jax.tree.map(np.asarray, generation)
    return jax.device_get(generation)

  def resume(
    self,
    encoded: caches.Encoded,
    state: loop.DecodingState | None,
    active: np.ndarray,
    threshold: float,
    resume_at: np.ndarray,
  ) -> loop.DecodingState:
    """Decodes the active rows from some token of each on; see `program.Program.resume`.

    On one device; `state` is what an earlier call returned for the same prompts, None at first.
    """
    signals.check()
    program = self.runs()
    with compiled.at_precision(self.options.matmul_precision):
      return program.resume(
        self.weights,
        encoded,
        program.nothing_yet(len(active)) if state is None else state,
        active,
        np.asarray(threshold, np.float32),
        resume_at.astype(np.int32),
      )

  def output(
    self, generation: loop.Generation, row: int, input_length: int = 0
  ) -> outputs.Output:
    """One row of a generation (numpy arrays [batch, max_decode_length]) as text."""
    length = int(np.sum(np.asarray(generation.exit_layers[row]) > 0))
    columns = lambda array: tuple(array[row][:length].tolist())
    tokens, passes = columns(generation.tokens), generation.verification
    return outputs.Output(
      text=self.vocabulary.decode(list(tokens)),
      tokens=tokens,
      pieces=tuple(map(self.vocabulary.piece, tokens)),
      exit_layers=columns(generation.exit_layers),
      confidences=columns(generation.confidences),
      rejected_confidences=columns(generation.rejected_confidences),
      score=float(generation.scores[row]),
      num_layers=self.num_layers,
      eos_id=self.eos_id,
      input_length=input_length,
      drafted=() if passes is None else columns(passes.drafted),
      passes=0 if passes is None else int(passes.passes[row]),
      drafts=0 if passes is None else int(passes.drafts[row]),
    )

  # ---- Costs

  def step_costs(
    self,
    input_length: int,
    rule: exits.Rule | None = None,
    cache_length: int | None = None,
  ) -> costs.DecodingCosts:
    """FLOPs and bytes of a decode step, by the layer at which tokens leave.

    `input_length` is of the padded prompt, `cache_length` the positions of the caches that are
    read (None: those of the limit).
    """
    options = self.options
    if cache_length is None:
      limit = options.max_decode_length
      cache_length = pool.num_slots(limit) if options.refill else limit
    return costs.decoding_costs(
      self.config,
      input_length=input_length,
      cache_length=cache_length,
      rule=rule or options.rule,
      num_pieces=self.vocabulary.vocab_size,
      shortlist=len(options.shortlist or ()),
      weights_dtype=options.weights_dtype,
      head_dtype=options.head_dtype,
    )

  def total_costs(
    self, items: Sequence[outputs.Output], rule: exits.Rule | None = None
  ) -> costs.Totals:
    """FLOPs and bytes of outputs of `generate`, at full depth and at their exits."""
    # (first token, token after the last, positions of the caches that these read)
    stages: list[tuple[int, int, int | None]] = [(0, self.options.max_decode_length, None)]
    if not self.options.refill and isinstance(self.runs(rule), staged.StagedProgram):
      lengths = staged.lengths(self.options.max_decode_length)
      stages = [(first, last, last) for first, last in itertools.pairwise((0, *lengths))]
    total = costs.Totals(0, costs.Cost(), costs.Cost())
    for length in sorted({output.input_length for output in items}):
      rows = [output.exit_layers for output in items if output.input_length == length]
      for first, last, positions in stages:
        step = self.step_costs(length, rule, positions)
        total += costs.totals(step, [row[first:last] for row in rows])
    return total


def _padded(
  batch: prompt_batches.PromptBatch, size: int, length: int
) -> prompt_batches.PromptBatch:
  tokens = np.zeros((size, length), np.int32)
  tokens[: len(batch.tokens), : batch.tokens.shape[1]] = batch.tokens
  return prompt_batches.PromptBatch(batch.rows, tokens, np.arange(size) < len(batch.rows))


def can_be_exact(model: BatchDecoder) -> bool:
  """Whether texts from drafts are those of full depth: not where states are rounded to few
  bits, as passes over several positions are then rounded otherwise than single tokens."""
  return not options_lib.batch_size_affects_output(model.config, model.options)


def exact_rule(model: BatchDecoder, draft_layer: int | None = None) -> exits.Speculative:
  """The rule that decodes a model's full texts from its own exits, for `Predictor.generate`.

  Drafts come from the shortlist of the model's options where the head has more weights than
  the layers below the draft layer, else from the whole head (`options.draft_head`).

  Args:
    model: the model.
    draft_layer: k; None: a quarter of the layers.

  Raises:
    ValueError: the draft layer is not below the last, or there is one layer only; or it would
      not be exact (`can_be_exact`).
  """
  config, options = model.config, model.options
  if not can_be_exact(model):
    names = ("weights_dtype", "encoder_dtype")
    narrow = [name for name in names if getattr(options, name) == options_lib.IN_8_BITS]
    got = f"`{narrow[0]}` 'int8'" if narrow else f"`dtype` {config.dtype!r}"
    way_out = "leave one of the two out" if narrow else "give `dtype` 'float32'"
    raise ValueError(
      f"Expected states in float32 for exact decoding, got {got}: passes over drafts would be"
      f" rounded otherwise than full depth's tokens; {way_out}."
    )
  layer = max(1, config.num_decoder_layers // 4) if draft_layer is None else draft_layer
  head = options_lib.draft_head(config, options, layer)
  rule = exits.Speculative(layer, options.num_drafts, head)
  rule.depth(config.num_decoder_layers)
  return rule
