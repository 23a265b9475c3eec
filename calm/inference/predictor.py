"""A model that decodes prompts under its promise, and how its folder is
opened.
"""

import dataclasses
import functools
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from calm import arguments, checkpoints, exits
from calm.calibrate import NEVER_EXIT, Calibration, Online, Prompt, metrics
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations.procedure import describe_differences
from calm.checkpoints import files
from calm.console import Progress, Report
from calm.data import prompt_batches, prompt_files
from calm.decode import compiled, loop, sharded, speculative
from calm.decode.program import ModelWeights, Program, model_weights
from calm.inference import grid, outputs, timing
from calm.inference import options as options_lib
from calm.t5 import caches, costs, kernels, limits, network, parameters

# Beside a model with a promise, or beside one that full depth serves best.
CALIBRATION = "calibration.json"
FULL_DEPTH = "full_depth.json"
# Options that the layout of the weights depends on.
_LAYOUT = (
  "num_devices",
  "weights_dtype",
  "encoder_dtype",
  "head_dtype",
  "shortlist",
)


class SlowerThanFullDepth(UserWarning):
  """A threshold is served that was measured not to be faster than the full
  model.
  """


class UntrainedExits(UserWarning):
  """No decoder layer but the last has learned to write tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """A model ready to decode, and its promise.

  Attributes:
    config: the model's sizes.
    params: its T5X-shaped parameter tree.
    vocabulary: text <-> ids.
    options: how prompts are decoded.
    calibration: carries the promise, or None.
    threshold: what `generate` decodes with where it is given none; a
      calibration's.
    exact: how full depth is decoded where that was measured to be faster; None:
      static.
    one_shape: whether every batch is padded to one shape: one compiled program
      a rule.
    folder: what `load` opened; None of other parameters.
  """

  config: network.T5Config
  params: Mapping[str, Any] = dataclasses.field(repr=False)
  vocabulary: Any = dataclasses.field(repr=False)
  options: options_lib.DecodeOptions
  calibration: Calibration | None = None
  threshold: float | None = None
  exact: exits.Speculative | None = None
  one_shape: bool = dataclasses.field(default=False, kw_only=True)
  folder: pathlib.Path | None = dataclasses.field(default=None, init=False)

  def __post_init__(self):
    # Full depth asks for no exits, and would pass over measures and layers that
    # are none.
    self.options.rule.depth(self.num_layers)
    exits.allowed_layers(self.options.exit_layers, self.num_layers)
    exits.mapped_layers(
      self.options.rule, self.num_layers, self.config.exit_propagation
    )

  # ---- The promise

  @arguments.checked()
  def under(
    self, calibration: Calibration, *, allow_platform: bool = False
  ) -> "Predictor":
    """The same model under a calibration: its threshold is the default, its
    promise goes along.

    With `allow_platform` it may be of another platform or matmul precision;
    outputs then carry no promise (`platform_mismatch` says why). Warns
    (`SlowerThanFullDepth`) where its threshold was measured not to be faster;
    ValueError names the fields of another procedure.
    """
    calibration.refuse_other(self.procedure, allow_platform=allow_platform)
    if slow := timing.warning(calibration):
      warnings.warn(SlowerThanFullDepth(slow), stacklevel=3)
    return self.changed(
      calibration=calibration, threshold=calibration.threshold
    )

  @functools.cached_property
  def platform_mismatch(self) -> str:
    """The fields of the platform that differ from the calibration's; '' where
    none does.
    """
    procedure = None if self.calibration is None else self.calibration.procedure
    return (
      ""
      if procedure is None
      else describe_differences(procedure, self.procedure)
    )

  @arguments.checked()
  def calibrate(
    self,
    prompts: Sequence[Prompt | str | Mapping[str, Any]] | Any,
    *,
    tolerance: float,
    error_rate: float = 0.05,
    consistency: grid.Consistency = "textual",
    metric: metrics.MetricLike = "rouge_l",
    thresholds: Sequence[float] | None = None,
    folder: str | pathlib.Path | None = None,
    progress: Report | None = None,
  ) -> "Predictor":
    """The same model under the threshold that is certified on these prompts.

    Args:
      prompts: exchangeable prompts like those to come, which nothing was chosen
        on: texts, `Prompt`s, or a DataFrame with a column `input`.
      tolerance: delta, in (0, 1).
      error_rate: epsilon, in (0, 1).
      consistency: 'textual' (distance to the full model's text) or 'risk' (loss
        of quality against references).
      metric: name, import path or function of the text metric.
      thresholds: strictly descending; None takes the model's grid, or the
        measure's own.
      folder: keeps the generations, so that a run that was stopped goes on.
      progress: told of the share that is done, and what is being done; None
        shows it where someone looks on.

    Returns a predictor whose `generate` needs no threshold; the promise is in
    `calibration`, and the seconds beside full depth in its notes
    (`timing.noted`).
    """
    with Progress() as bar:
      shown = progress or bar
      calibration, cached = grid.certify(
        self,
        prompts,
        tolerance=tolerance,
        error_rate=error_rate,
        consistency=consistency,
        metric=metric,
        thresholds=thresholds,
        folder=folder,
        progress=grid.part(shown, 0.0, 0.9),
      )
      if calibration.certified:
        found = timing.beside_full_depth(
          self,
          [prompt.input for prompt in cached.prompts],
          calibration.threshold,
          prompts=8,
          rounds=3,
          progress=grid.part(shown, 0.9, 1.0, "timing "),
        )
        calibration = timing.note(calibration, found)
    return self.under(calibration)

  @arguments.checked()
  def online(
    self,
    path: str | pathlib.Path | None,
    *,
    tolerance: float,
    error_rate: float = 0.05,
    metric: str = "rouge_l",
    thresholds: Sequence[float] | None = None,
    **options: Any,
  ) -> Online:
    """A state for `generate(online=...)`: the threshold is calibrated while
    prompts are served.

    Args:
      path: its file, which a later run goes on with; None keeps it in memory.
      tolerance: delta, of the mean distance to the full model's text, in (0,
        1).
      error_rate: epsilon, in (0, 1).
      metric: name or import path of the text metric.
      thresholds: strictly descending; None takes the model's grid, or the
        measure's own.
      **options: of `calibrate.Online`, as `share`.

    Raises:
      ValueError: an argument has no meaning, or the file is another's.
    """
    return Online(
      path,
      thresholds or grid.default_grid(self.options),
      tolerance=tolerance,
      error_rate=error_rate,
      about={
        "metric": metrics.get_metric(metric).name,
        "procedure": self.procedure.digest(),
      },
      **options,
    )

  # ---- Texts

  @arguments.checked(threshold=thresholds_lib.parse_threshold)
  def generate(
    self,
    texts: Iterable[str] | Any,
    *,
    threshold: float | None = None,
    rule: exits.Rule | None = None,
    online: Online | None = None,
    ids: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    parts: Callable[[int, outputs.Output], None] | None = None,
  ) -> outputs.Outputs:
    """Decodes prompts greedily.

    Args:
      texts: the prompts, without task prefix.
      threshold: lambda in [0, 1], or `schedules.NEVER_EXIT` ('never'). None
        takes the one of the calibration; any other carries no promise.
        `NEVER_EXIT` runs the full-depth program of `reference`, which pays for
        no confidence.
      rule: another way through the layers: `exits.StaticExit(k)`,
        `exits.OracleExit()`, which have no threshold, or
        `exits.Speculative(k)`, which is the full model's own text (with a
        `threshold` of 1 - lambda below 1: but for drafts that are likely
        enough).
      online: a state of `Predictor.online`: its threshold is taken, and the
        prompts that it draws are decoded at full depth and at its open
        thresholds too.
      ids: [num_texts] names by which `online` draws each prompt, or cluster of
        prompts, once; None takes the texts.
      progress: told how many prompts are done of how many; None shows it where
        someone looks on (a terminal or a notebook) and it takes long.
      parts: told of a prompt's number and its output so far, after each of its
        tokens.

    Raises:
      ValueError: there is neither a threshold nor a calibration nor a rule
        without one, or an argument has no meaning.
      TypeError: `texts` is no list of texts.
    """
    texts = prompt_files.check_texts(texts)
    if online is not None:
      if threshold is not None or rule is not None:
        raise ValueError(
          "`online` needs neither `threshold` nor `rule`; leave these out."
        )
      return grid.serve_online(self, online, texts, ids, progress, parts)
    if (
      threshold is None
      and rule is None
      and (threshold := self.threshold) is None
    ):
      raise ValueError(
        "Expected `threshold`, or a model loaded with a `calibration`, got "
        "neither; pass a"
        " number in [0, 1], or calm.exits.schedules.NEVER_EXIT for the full "
        "model."
      )
    if threshold is not None:
      threshold = thresholds_lib.parse_threshold(threshold)
    if rule is not None:
      rule.depth(self.num_layers)  # the rule's own check of its layers
    promised = rule is None
    model = self
    if promised and threshold == NEVER_EXIT:
      # Where no token can leave early, no confidence is asked for.
      model = self.reference
      rule = self.exact or exits.StaticExit()
    with Progress() as bar:
      report = progress or bar.count("prompts")
      decoded = model.decode_texts(texts, threshold, rule, report, parts)
    made = self.calibration if promised else None
    if made is None or threshold != made.threshold or self.platform_mismatch:
      return decoded
    return dataclasses.replace(decoded, guarantee=made.guarantee)

  def decode_texts(
    self,
    texts: Sequence[str],
    threshold: float | None,
    rule: exits.Rule | None,
    progress: Callable[[int, int], None],
    parts: Callable[[int, outputs.Output], None] | None = None,
  ) -> outputs.Outputs:
    """Decodes prompts by one program and without a promise; arguments as for
    `generate`.
    """
    jax.block_until_ready(self.weights)  # laid out once, and not timed
    programs = compiled.num_made()
    compiling = compiled.seconds()

    def now():
      return time.perf_counter() - compiled.seconds()

    level = NEVER_EXIT if threshold is None else threshold
    items: dict[int, outputs.Output] = {}
    encode = decode = 0.0
    every = range(1, self.options.max_decode_length + 1)
    for batch in self.plan(texts):
      progress(len(items), len(texts))
      start = now()
      encoded = jax.block_until_ready(self.encode(batch))
      encode, start = encode + now() - start, now()
      if parts is None:
        generation = self.decode(encoded, batch.active, level, rule)
      else:
        for generation in self.stream(
          encoded, batch.active, level, rule, ends=every
        ):
          for i, row in enumerate(batch.rows):
            parts(int(row), self.output(generation, i))
      decode += now() - start
      for i, row in enumerate(batch.rows):
        items[int(row)] = self.output(generation, i)
    progress(len(texts), len(texts))
    made, compiling = (
      compiled.num_made() - programs,
      compiled.seconds() - compiling,
    )
    seconds = outputs.Timing(encode, decode, made, compiling)
    in_order = tuple(items[row] for row in range(len(texts)))
    return outputs.Outputs(in_order, self.num_layers, threshold, None, seconds)

  def output(self, generation: loop.Generation, row: int) -> outputs.Output:
    """One row of a generation (numpy arrays [batch, max_decode_length]) as
    text.
    """
    length = int(np.sum(np.asarray(generation.exit_layers[row]) > 0))

    def columns(array):
      return tuple(array[row][:length].tolist())

    tokens = columns(generation.tokens)
    passes = generation.verification
    drafts: dict[str, Any] = {}
    if passes is not None:
      counts = {
        "passes": int(passes.passes[row]),
        "drafts": int(passes.drafts[row]),
      }
      drafts = {"drafted": columns(passes.drafted), **counts}
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
      **drafts,
    )

  def fit(
    self, rows: Any, *, output: str | pathlib.Path, **options: Any
  ) -> "Predictor":
    """`calm.fit` of the folder that this model was loaded from; what `load` was
    asked besides is not read. Returns the model in `output`, under its promise.

    Raises:
      ValueError: the model came from no folder, or with exits of another one;
        or as `calm.fit`.
    """
    import calm

    if self.folder is None:
      raise ValueError(
        "Expected a model that `calm.load` opened with its folder's own "
        "exits, got one of"
        " another origin; save it, and call `calm.fit(FOLDER, rows, "
        "output=...)`."
      )
    return calm.fit(self.folder, rows, output=output, **options)

  # ---- The same model otherwise

  def changed(self, **fields: Any) -> "Predictor":
    """The same parameters with other fields, and with the digests and weights
    of this one.
    """
    other = dataclasses.replace(self, **fields)

    def layout(model):
      return (
        model.config,
        *(getattr(model.options, n) for n in _LAYOUT),
      )

    alike = ("weights", "_parts") if layout(self) == layout(other) else ()
    for name in ("parameters_digest", "base_digest", "folder", *alike):
      if name in self.__dict__:
        other.__dict__[name] = self.__dict__[name]
    return other

  def with_options(self, **options: Any) -> "Predictor":
    """The same model under other options and without a calibration."""
    made = options_lib.change(self.config, self.options, **options)
    return self.changed(
      options=made, calibration=None, threshold=None, exact=None
    )

  @property
  def batch_size_affects_output(self) -> bool:
    """Whether a text depends on the rows that are decoded together with it:
    where states are rounded to few bits, a sum's last bit may decide which
    token follows. Texts from drafts are then not those of full depth: passes
    over several positions are rounded otherwise.
    """
    dtypes = self.options.weights_dtype, self.options.encoder_dtype
    return self.config.dtype != "float32" or "int8" in dtypes

  @property
  def packs(self) -> bool:
    """Whether prompts are encoded without the padding of their batch, in 8
    bits: what one gets depends on no other then. Float32 sums depend on how
    many rows there are anyway.
    """
    plain = self.config.dtype == "float32" and self.options.num_devices == 1
    return plain and self.batch_size_affects_output and kernels.available()

  @functools.cached_property
  def reference(self) -> "Predictor":
    """The model that writes the texts of full depth which a promise compares
    with.

    Under a `reference_dtype` it is the same parameters with states and weights
    in float32, laid out a second time where these options have others; else the
    model itself.
    """
    options = self.options
    dtype = self.options.reference_dtype
    narrow = options.weights_dtype not in (None, dtype)
    if dtype is None or not (self.batch_size_affects_output or narrow):
      return self
    plain = self.with_options(
      weights_dtype=None, encoder_dtype=None, reference_dtype=None
    )
    return plain.changed(config=dataclasses.replace(self.config, dtype=dtype))

  # ---- What it is

  @functools.cached_property
  def weights(self) -> ModelWeights:
    """The parameters laid out for decoding."""
    options = self.options
    weights = model_weights(
      self.params,
      self.config,
      self.vocabulary.vocab_size,
      options.shortlist,
      options.weights_dtype,
      options.head_dtype,
      encoder_dtype=options.encoder_dtype,
      native=self.config.dtype == "float32",
    )
    return sharded.replicate(weights, options.num_devices)

  @functools.cached_property
  def _parts(self) -> tuple[ModelWeights, ModelWeights]:
    """The weights that prompts are encoded with, and those of decoding: a
    program looks at its arguments one by one, 0.1 ms of a short prompt's
    encoding if it is given all.
    """
    decoder = self.weights.decoder
    once = "cross_key_value"
    others = {
      f.name: None for f in dataclasses.fields(decoder) if f.name != once
    }
    encodes = ModelWeights(
      self.weights.encoder, dataclasses.replace(decoder, **others)
    )
    return encodes, ModelWeights({}, dataclasses.replace(decoder, **{once: ()}))

  @functools.cached_property
  def parameters_digest(self) -> str:
    return checkpoints.parameters_digest(self.params)

  @functools.cached_property
  def base_digest(self) -> str | None:
    """Of the parameters that full-depth texts depend on, where exits have maps
    beside them.
    """
    maps = self.config.exit_translators or self.config.exit_propagation
    return parameters.base_digest(self.params) if maps else None

  @functools.cached_property
  def expected_drafts(
    self,
  ) -> dict[tuple[exits.Rule, float, int], speculative.History]:
    """What drafts of the texts so far were worth, by rule, threshold and rows
    of a batch.
    """
    return {}

  @property
  def eos_id(self) -> int:
    return 1 if self.vocabulary.eos_id is None else self.vocabulary.eos_id

  @property
  def num_layers(self) -> int:
    """Decoder layers."""
    return self.config.num_decoder_layers

  procedure = property(options_lib.procedure)

  def step_costs(self, input_length: int) -> costs.DecodingCosts:
    """FLOPs and bytes of a decode step, by the layer at which tokens leave, of
    prompts that are padded to `input_length`.
    """
    options = self.options
    return costs.decoding_costs(
      self.config,
      input_length=input_length,
      cache_length=options.max_decode_length,
      rule=options.rule,
      num_pieces=self.vocabulary.vocab_size,
      shortlist=len(options.shortlist or ()),
      weights_dtype=options.weights_dtype,
      head_dtype=options.head_dtype,
    )

  # ---- Batches

  def program(self, rule: exits.Rule | None = None) -> Program:
    """The compiled program of a rule (the options' own by default)."""
    return Program(
      self.config,
      rule or self.options.rule,
      self.options.max_decode_length,
      self.eos_id,
      native=self.config.dtype == "float32",
    )

  def _sharded(self, program: Program) -> Program | sharded.ShardedProgram:
    count = self.options.num_devices
    return program if count == 1 else sharded.ShardedProgram(program, count)

  def plan(self, texts: Sequence[str]) -> list[prompt_batches.PromptBatch]:
    """Tokenises prompts and groups them into batches."""
    options = self.options
    size = options.batch_size * options.num_devices
    length = options.max_input_length
    tokens = prompt_batches.tokenize(
      texts,
      self.vocabulary,
      prefix=options.task_prefix,
      max_input_length=length,
      eos_id=self.eos_id,
    )
    return prompt_batches.plan(
      tokens,
      batch_size=size,
      max_input_length=length,
      # The size is part of the procedure there: another one rounds otherwise.
      whole_batches=self.batch_size_affects_output,
      one_shape=self.one_shape,
    )

  def encode(self, batch: prompt_batches.PromptBatch) -> caches.Encoded:
    """Encodes a batch once, for any number of thresholds."""
    # The rule has no part in it: one compiled encoder serves all of them.
    program = Program(self.config, exits.StaticExit(), 1, self.eos_id)
    packed = [network.pack(batch.tokens)] if self.packs else []
    with compiled.at_precision(self.options.matmul_precision):
      return self._sharded(program).encode(
        self._parts[0], batch.tokens, *packed
      )

  def decode(
    self,
    encoded: caches.Encoded,
    active: np.ndarray,
    threshold: float,
    rule: exits.Rule | None = None,
  ) -> loop.Generation:
    """Decodes the active rows of an encoded batch; numpy arrays come back."""
    chosen = rule or self.options.rule
    rows = len(active)
    if not isinstance(chosen, exits.Speculative):
      return self._run(rule, encoded, active, threshold)
    key = chosen, threshold, rows
    if key not in self.expected_drafts:
      each = -(-rows // self.options.num_devices)
      cost = speculative.draft_cost(
        self.config, self.weights.decoder, chosen, each
      )
      # Texts with slack are what drafts make of them, and full depth would
      # round otherwise than passes do where a text is not exact.
      must = threshold < 1 or chosen.measures or self.batch_size_affects_output
      self.expected_drafts[key] = speculative.History(
        cost, must or not chosen.adapts
      )
    history = self.expected_drafts[key]
    if not history.drafts_next():
      full = self._run(exits.StaticExit(), encoded, active, NEVER_EXIT)
      return loop.without_drafts(full)
    generation = self._run(chosen, encoded, active, threshold)
    history.update(generation)
    return generation

  def expect_drafts(self) -> None:
    """The next batch makes drafts, whatever those before it were worth: to time
    them.
    """
    for history in self.expected_drafts.values():
      history.backoff = 0

  def _run(self, rule, encoded, active, threshold: float) -> loop.Generation:
    """One batch through the program of a rule, fetched to the host."""
    program = self._sharded(self.program(rule))
    with compiled.at_precision(self.options.matmul_precision):
      return program.generate(self._parts[1], encoded, active, threshold)

  def stream(
    self,
    encoded: caches.Encoded,
    active: np.ndarray,
    threshold: float,
    rule: exits.Rule | None = None,
    *,
    ends: Sequence[int],
  ) -> Iterator[loop.Generation]:
    """`decode` in parts, after so many tokens as `ends` say, ascending; the
    last limits them. Drafts, and several devices, give one part; an end of 0
    compiles what any other needs.
    """
    program = self.program(rule)
    state = None
    position = 0
    if program.rule.speculates or self.options.num_devices > 1:
      yield self.decode(encoded, active, threshold, rule)
      return
    weights = self._parts[1]
    level = np.float32(threshold)
    for stage in program.stages:
      for position in sorted(
        {min(n, stage.length) for n in ends if n > position or not n}
      ):
        with compiled.at_precision(self.options.matmul_precision):
          state = state or stage.start(weights, encoded, active, level)
          state = stage.go_on(
            weights, encoded, state, level, np.int32(position)
          )
        yield jax.tree.map(np.asarray, state.generation)
        if not np.asarray(state.active).any():
          return

  def resume(
    self,
    encoded: caches.Encoded,
    state: loop.DecodingState | None,
    active: np.ndarray,
    threshold: float,
    resume_at: np.ndarray,
  ) -> loop.DecodingState:
    """`program.Program.regenerate` on one device; `state` is what an earlier
    call returned for the same prompts, None at first.
    """
    level, resume_at = (
      np.asarray(threshold, np.float32),
      resume_at.astype(np.int32),
    )
    with compiled.at_precision(self.options.matmul_precision):
      return self.program().regenerate(
        self._parts[1], encoded, state, active, level, resume_at
      )


def exact_rule(model: Predictor) -> exits.Speculative:
  """The rule that decodes a model's full texts from its own exits, for
  `Predictor.generate`.

  A quarter of the layers drafts, by the shortlist of the model's options where
  the head has more weights than these layers, else by the whole head
  (`options.draft_head`).

  Raises:
    ValueError: there is one layer only, or it would not be exact
      (`Predictor.batch_size_affects_output`).
  """
  config = model.config
  options = model.options
  if model.batch_size_affects_output:
    got = f"`dtype` {config.dtype!r}, `weights_dtype` {options.weights_dtype!r}"
    raise ValueError(
      f"Expected states in float32 for exact decoding, got {got} and "
      "`encoder_dtype`"
      f" {options.encoder_dtype!r}, with which passes over drafts round "
      "otherwise than full"
      " depth's tokens; give `dtype` 'float32' and leave 'int8' out."
    )
  layer = max(1, config.num_decoder_layers // 4)
  head = options_lib.draft_head(config, options, layer)
  rule = exits.Speculative(layer, options.num_drafts, head)
  rule.depth(config.num_decoder_layers)
  return rule


@arguments.checked()
def load(
  path: str | pathlib.Path = "packed",
  *,
  calibration: Calibration | str | pathlib.Path | None = None,
  void_guarantee: bool = False,
  allow_platform: bool = False,
  dtype: npt.DTypeLike | None = None,
  exits: str | pathlib.Path | None = None,
  **options: Any,
) -> Predictor:
  """Opens a model for decoding.

  Args:
    path: a checkpoint directory of any format that `checkpoints.load` knows, or
      'packed' for the small model inside this package.
    calibration: a `Calibration` or its JSON file. Its procedure sets the
      options that are not given; a model or an option that differs from it is
      refused. None takes the `calibration.json` of the model's own folder,
      where there is one and no option that is given differs from it.
    void_guarantee: decode under another procedure all the same: the calibrated
      threshold stays, the promise goes.
    allow_platform: decode all the same where the calibration differs in nothing
      but the platform that it was made on and its matmul precision. Outputs
      carry no promise; with `generate(online=...)` this platform earns one of
      its own.
    dtype: activation dtype, 'float32' or 'bfloat16'; None takes the
      checkpoint's.
    exits: a file of exits that `calm fit` learned beside this model's weights,
      or the folder that it wrote; None takes the model folder's own, where
      there is one.
    **options: fields of `DecodeOptions`.

  Raises:
    ValueError: the calibration is for another procedure (the message names the
      fields), or the checkpoint has no vocabulary.
  """
  sharded.make_cpu_devices(options.get("num_devices"))
  directory = (
    checkpoints.PACKED if str(path) == "packed" else pathlib.Path(path)
  )
  checkpoint = checkpoints.load(directory, exits=exits)
  if checkpoint.vocabulary is None:
    raise ValueError(
      f"Expected a vocabulary beside the checkpoint in {directory}, got "
      "none; save the model"
      " with one (`checkpoints.save(..., vocabulary=...)`)."
    )
  if isinstance(calibration, str | pathlib.Path):
    calibration = Calibration.load(calibration)
  base = options_lib.DecodeOptions(**options_lib.stored_options(directory))
  given = bool(options) or dtype is not None
  if (
    calibration is not None and (procedure := calibration.procedure) is not None
  ):
    base = options_lib.options_of(procedure, base.shortlist)
    dtype = procedure.activation_dtype if dtype is None else dtype
  dtype = checkpoint.config.dtype if dtype is None else dtype
  config = dataclasses.replace(checkpoint.config, dtype=dtype)
  changed = options_lib.change(config, base, **options)
  predictor = Predictor(
    config, checkpoint.params, checkpoint.vocabulary, changed
  )
  predictor.__dict__["folder"] = directory if exits is None else None
  if calibration is not None and void_guarantee:
    return predictor.changed(threshold=calibration.threshold)
  if calibration is not None:
    return predictor.under(calibration, allow_platform=allow_platform)
  own = directory / CALIBRATION
  full_depth = directory / FULL_DEPTH
  if own.exists() and not void_guarantee:
    calibration = Calibration.load(own)
    pair = calibration.procedure, predictor.procedure
    if given and describe_differences(*pair, allow_platform=True):
      return predictor  # under options of the user's: without a promise
    with files.naming(own):
      return predictor.under(calibration, allow_platform=allow_platform)
  if full_depth.exists():
    keeps = not (given or predictor.batch_size_affects_output)
    exact = stored_rule(full_depth) if keeps else None
    return predictor.changed(threshold=NEVER_EXIT, exact=exact)
  if (
    checkpoint.exits_trained is False
    and not config.exit_translators
    and not own.exists()
  ):
    warnings.warn(
      UntrainedExits(
        f"the exits of {directory} were never trained: tokens that leave "
        "before its last"
        " decoder layer are often wrong. Train them (`calm fit`, or `calm "
        "train`), or decode at"
        " full depth (the threshold 'never')."
      ),
      stacklevel=3,
    )
  return predictor


def stored_rule(path: pathlib.Path) -> exits.Speculative | None:
  """The rule that a folder's `full_depth.json` names, where it was measured to
  be faster.
  """
  stored = files.read_json(path).get("exact")
  if stored is None:
    return None
  known = {field.name for field in dataclasses.fields(exits.Speculative)}
  with files.naming(path):
    if not isinstance(stored, dict) or set(stored) != known:
      raise ValueError(
        f"Expected `exact` to have {sorted(known)}, got {stored!r}."
      )
    limits.whole(
      "draft_layer",
      stored["draft_layer"],
      0,
      limits.SIZES["num_decoder_layers"][1],
    )
    return exits.Speculative(**stored)
