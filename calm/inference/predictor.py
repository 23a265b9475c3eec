"""Prompts -> `Outputs`: a model, its vocabulary and, where there is one, its promise.

    model = inference.load("packed", calibration="calibration.json")
    outputs = model.generate(["A long description of a package ..."])

Needs no TensorFlow, seqio or T5X.
"""

import contextlib
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from calm import arguments, checkpoints, exits, signals
from calm.calibrate import Calibration, Procedure, Prompt
from calm.calibrate import seconds as seconds_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations.procedures import describe_differences
from calm.calibrate.losses import metrics
from calm.console import Progress
from calm.data import prompt_batches, prompt_files
from calm.decode import compiled, loop, pool_program
from calm.decode import program as program_lib
from calm.decode import sharded as sharded_lib
from calm.decode import staged as staged_lib
from calm.exits import schedules
from calm.inference import calibrating, compiling, drafts, grid, procedures, running, views
from calm.inference import exact as exact_lib
from calm.inference import outputs as outputs_lib
from calm.inference.options import DecodeOptions, change
from calm.t5 import caches, network, parameters


class SlowerThanFullDepth(UserWarning):
  """A threshold is served that was measured not to be faster than the full model."""


SomePredictor = TypeVar("SomePredictor", bound="Predictor")


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """A model ready to decode.

  Attributes:
    config: the model's sizes.
    params: its T5X-shaped parameter tree.
    vocabulary: text <-> ids.
    options: how prompts are decoded.
    calibration: carries the promise, or None.
    threshold: what `generate` decodes with where it is given none; a calibration's.
    exact: how full depth is decoded where that was measured to be faster; None: static.
  """

  config: network.T5Config
  params: Mapping[str, Any] = dataclasses.field(repr=False)
  vocabulary: Any = dataclasses.field(repr=False)
  options: DecodeOptions
  calibration: Calibration | None = None
  threshold: float | None = None
  exact: exits.Verified | None = None

  def __repr__(self) -> str:
    return views.in_short(self)

  @functools.cached_property
  def weights(self) -> program_lib.ModelWeights:
    """The parameters laid out for decoding."""
    weights = program_lib.model_weights(
      self.params,
      self.config,
      self.vocabulary.vocab_size,
      self.listed,
      self.options.weights_dtype,
      self.options.head_dtype,
      self.options.encoder_dtype,
    )
    sharded = self.sharded()
    return weights if sharded is None else sharded.replicate(weights)

  @functools.cached_property
  def expected_drafts(self) -> dict[tuple[exits.Verified, float], drafts.Expected]:
    """What drafts of the texts so far were worth, by rule and threshold."""
    return {}

  @property
  def listed(self) -> tuple[int, ...] | None:
    """The tokens of `weights`' shortlist, which drafts come from whatever the measure."""
    # One head a layer has none.
    wanted = self.options.uses_shortlist or not self.config.per_layer_heads
    return self.options.shortlist if wanted else None

  @functools.cached_property
  def parameters_digest(self) -> str:
    return checkpoints.parameters_digest(self.params)

  @functools.cached_property
  def base_digest(self) -> str | None:
    """Of the parameters that full-depth texts depend on, where exits have maps beside them."""
    maps = self.config.exit_translators or self.config.exit_propagation
    return parameters.base_digest(self.params) if maps else None

  def with_exits(self, file: str | pathlib.Path) -> "Predictor":
    """The same model with the exits of a file that `calm fit` learned beside its weights.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: they were learned beside other weights.
    """
    config, params = checkpoints.with_exits(self.config, self.params, file)
    return dataclasses.replace(self, config=config, params=params)

  @property
  def reference(self) -> "Predictor":
    """The model that writes the texts of full depth which a promise compares with.

    Under a `reference_dtype` it is the same parameters with states and weights in float32, laid
    out a second time where these options have others; else the model itself.
    """
    approximates = procedures.batch_size_affects_output(self.config, self.options) or (
      self.options.weights_dtype not in (None, self.options.reference_dtype)
    )
    apart = self.options.reference_dtype is not None and approximates
    return self._reference if apart else self

  @functools.cached_property
  def _reference(self) -> "Predictor":
    plain = {"weights_dtype": None, "encoder_dtype": None, "reference_dtype": None}
    return self.sharing(
      dataclasses.replace(
        self,
        config=dataclasses.replace(self.config, dtype=self.options.reference_dtype),
        options=dataclasses.replace(self.options, **plain),
        calibration=None,
        threshold=None,
      )
    )

  @property
  def eos_id(self) -> int:
    eos_id = self.vocabulary.eos_id
    return 1 if eos_id is None else eos_id

  @property
  def num_layers(self) -> int:
    """Decoder layers."""
    return self.config.num_decoder_layers

  def __post_init__(self):
    # Full depth asks for no exits, and would pass over measures and layers that are none.
    self.options.rule.depth(self.num_layers)
    exits.allowed_layers(self.options.exit_layers, self.num_layers)
    exits.mapped_layers(self.options.rule, self.num_layers, self.config.exit_propagation)

  @property
  def procedure(self) -> Procedure:
    """What a calibration of this model's outputs is valid for."""
    return procedures.procedure(
      self.config,
      self.options,
      parameters_digest=self.parameters_digest,
      tokenizer_digest=self.vocabulary.digest(),
      eos_id=self.eos_id,
      base_digest=self.base_digest,
    )

  def with_options(self, **options: Any) -> "Predictor":
    """The same model under other options and without a calibration."""
    changed = exact_lib.with_draft_head(self.config, change(self.options, **options), options)
    none = {"calibration": None, "threshold": None, "exact": None}
    return self.sharing(dataclasses.replace(self, options=changed, **none))

  def sharing(self, other: SomePredictor) -> SomePredictor:
    """`other`, a model of the same parameters, with what was made of them already."""
    made = ["parameters_digest", "base_digest"]
    laid_out = lambda model: (
      model.options.num_devices,
      model.options.weights_dtype,
      model.options.encoder_dtype,
      model.options.head_dtype,
      model.listed,
      model.config,
    )
    if laid_out(self) == laid_out(other):
      made.append("weights")
    other.__dict__.update({name: self.__dict__[name] for name in made if name in self.__dict__})
    return other

  @arguments.checked()
  def under(self, calibration: Calibration, *, allow_platform: bool = False) -> "Predictor":
    """The same model under a calibration: its threshold is the default, its promise goes along.

    Args:
      calibration: for this procedure.
      allow_platform: take one that was made on another platform or with another matmul
        precision too; outputs then carry no promise (`elsewhere` says why).

    Warns (`SlowerThanFullDepth`) where its threshold was measured not to be faster.

    Raises:
      ValueError: the calibration is for another procedure; the message names the fields.
    """
    calibration.refuse_other(self.procedure, allow_platform=allow_platform)
    threshold = calibration.threshold
    if slow := seconds_lib.warning(calibration):
      warnings.warn(SlowerThanFullDepth(slow), stacklevel=3)
    return self.sharing(dataclasses.replace(self, calibration=calibration, threshold=threshold))

  @functools.cached_property
  def elsewhere(self) -> str:
    """What of the platform differs from the calibration's, named; '' where nothing does."""
    procedure = None if self.calibration is None else self.calibration.procedure
    return "" if procedure is None else describe_differences(procedure, self.procedure)

  @arguments.checked()
  def calibrate(
    self,
    prompts: Sequence[Prompt | str | Mapping[str, Any]] | Any,
    *,
    tolerance: float,
    error_rate: float = 0.05,
    consistency: str = "textual",
    metric: metrics.MetricLike = "rouge_l",
    thresholds: Sequence[float] | None = None,
    folder: str | pathlib.Path | None = None,
    progress: grid.Progress | None = None,
  ) -> "Predictor":
    """The same model under the threshold that is certified on these prompts.

    Args:
      prompts: exchangeable prompts like those to come, which nothing was chosen on: texts,
        `Prompt`s, or a DataFrame with a column `input`.
      tolerance: delta, in (0, 1).
      error_rate: epsilon, in (0, 1).
      consistency: 'textual' (distance to the full model's text) or 'risk' (loss of quality
        against references).
      metric: name, import path or function of the text metric.
      thresholds: strictly descending; None takes the model's grid, or the measure's own.
      folder: keeps the generations, so that a run that was stopped goes on, and the ledger of
        what its prompts were asked, which warns of a second question; None keeps neither.
      progress: told after every batch and threshold; None shows it where someone looks on.

    Returns:
      A predictor whose `generate` needs no threshold; the promise is in `calibration`, and the
      seconds that were measured beside full depth in its notes (`calibrate.seconds.of`).
    """
    made = calibrating.certify_and_time(
      self,
      prompts,
      tolerance=tolerance,
      error_rate=error_rate,
      consistency=consistency,
      metric=metric,
      thresholds=thresholds,
      folder=folder,
      progress=progress,
    )
    return self.under(made)

  def program(self, rule: exits.Rule | None = None) -> program_lib.Program:
    """The compiled program of a rule (the options' own by default)."""
    return program_lib.Program(
      self.config,
      rule or self.options.rule,
      self.options.max_decode_length,
      self.eos_id,
      self.options.engine if rule is None else None,
      native=not procedures.decoder_rounds(self.config, self.options),
    )

  def sharded(self, rule: exits.Rule | None = None) -> sharded_lib.ShardedProgram | None:
    """`program` spread over the options' devices; None where there is one."""
    count = self.options.num_devices
    return None if count == 1 else sharded_lib.ShardedProgram(self.program(rule), count)

  def runs(self, rule: exits.Rule | None = None) -> Any:
    """What `decode` runs: `sharded`, or `program`, in stages where last bits decide nothing."""
    whole, bits = self.sharded(rule) or self.program(rule), procedures.decoder_rounds
    return whole if bits(self.config, self.options) else staged_lib.staged(whole)

  def plan(self, texts: Sequence[str]) -> list[prompt_batches.PromptBatch]:
    """Tokenises prompts and groups them into batches."""
    tokens = prompt_batches.tokenize(
      prompt_files.check_texts(texts),
      self.vocabulary,
      prefix=self.options.task_prefix,
      max_input_length=self.options.max_input_length,
      eos_id=self.eos_id,
    )
    return prompt_batches.plan(
      tokens,
      batch_size=self.options.batch_size * self.options.num_devices,
      max_input_length=self.options.max_input_length,
      # The size is part of the procedure there: another one rounds otherwise.
      whole_batches=procedures.batch_size_affects_output(self.config, self.options),
    )

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
    if isinstance(chosen, exits.Verified):
      return drafts.decode(self, encoded, active, threshold, chosen)
    return running.run(self, rule, encoded, active, threshold)

  def resume(
    self,
    encoded: caches.Encoded,
    state: loop.DecodingState | None,
    active: np.ndarray,
    threshold: float,
    resume_at: np.ndarray,
  ) -> loop.DecodingState:
    """Decodes the active rows from some token of each on; see `program.Program.resume`.

    Args:
      encoded: from `encode`, on one device.
      state: what an earlier call returned for the same prompts; None: nothing yet.
      active: rows to decode, [batch]; the others stay as they are.
      threshold: lambda.
      resume_at: the first token of each row that may differ from `state`, [batch].
    """
    signals.check()
    program = self.runs() if self.options.num_devices == 1 else self.program()
    with compiled.at_precision(self.options.matmul_precision):
      return program.resume(
        self.weights,
        encoded,
        program.nothing_yet(len(active)) if state is None else state,
        active,
        np.asarray(threshold, np.float32),
        resume_at.astype(np.int32),
      )

  @arguments.checked(threshold=thresholds_lib.parse_threshold)
  def generate(
    self,
    texts: Iterable[str] | Any,
    *,
    threshold: float | None = None,
    rule: exits.Rule | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> outputs_lib.Outputs:
    """Decodes prompts greedily.

    Args:
      texts: the prompts, without task prefix.
      threshold: lambda in [0, 1], or `schedules.NEVER_EXIT` ('never'). None takes the one
        of the calibration; any other carries no promise. `NEVER_EXIT` runs the full-depth
        program of `reference`, which pays for no confidence.
      rule: another way through the layers: `exits.StaticExit(k)`, `exits.OracleExit()`, which
        have no threshold, or `exits.Verified(k)`, which is the full model's own text (with a
        `threshold` of 1 - lambda below 1: but for drafts that are likely enough).
      progress: told how many prompts are done of how many; None shows it where someone looks
        on (a terminal or a notebook) and it takes long.

    Raises:
      ValueError: there is neither a threshold nor a calibration nor a rule without one, or an
        argument has no meaning.
      TypeError: `texts` is no list of texts.
    """
    texts = prompt_files.check_texts(texts)
    calibrated = None if rule is not None else self.calibration
    if threshold is None and rule is None:
      threshold = self.threshold
    if threshold is None and rule is None:
      raise ValueError(
        "Expected `threshold`, or a model loaded with a `calibration`, got neither; pass a"
        " number in [0, 1], or calm.exits.schedules.NEVER_EXIT for the full model."
      )
    if threshold is not None:
      schedules.check_threshold(threshold)
    if rule is not None:
      rule.depth(self.num_layers)  # the rule's own check of its layers
    chosen = rule or self.served_rule(threshold)
    full = rule is None and threshold == schedules.NEVER_EXIT
    with contextlib.ExitStack() as stack:
      report = progress or stack.enter_context(Progress()).count("prompts")
      predictor = self.reference if full else self
      decoded = predictor._decode_texts(texts, threshold, chosen, report)
    if calibrated is None or threshold != calibrated.threshold or self.elsewhere:
      return decoded
    return dataclasses.replace(decoded, guarantee=calibrated.guarantee)

  def served_rule(self, threshold: float | None) -> exits.Rule | None:
    """The rule that `generate` runs a threshold with: None is the options' own.

    Where no token can leave early, no confidence is asked for: that is the full-depth program.
    """
    never = threshold == schedules.NEVER_EXIT
    return (self.exact or exits.StaticExit()) if never else None

  def _decode_texts(
    self,
    texts: Sequence[str],
    threshold: float | None,
    rule: exits.Rule | None,
    progress: Callable[[int, int], None],
  ) -> outputs_lib.Outputs:
    """Prompts through batches or a pool of rows, in the order of the list and timed."""
    made, clock, begun = compiled.num_made(), compiling.Clock(), 0

    def encode(batch: prompt_batches.PromptBatch) -> caches.Encoded:
      nonlocal begun
      progress(begun, len(texts))  # those before it are done, or nearly in a pool
      begun += len(batch.rows)
      return clock.run("encode", functools.partial(self.encode, batch))

    level = schedules.NEVER_EXIT if threshold is None else threshold
    items: dict[int, outputs_lib.Output] = {}
    verified = isinstance(rule or self.options.rule, exits.Verified)
    pooled = self.options.refill and not verified  # whose rows have positions of their own
    for batches in prompt_batches.together(self.plan(texts), pooled=pooled):
      if len(batches) > 1:
        pool = pool_program.PoolProgram(self.program(rule))
        with clock.phase("decode"), compiled.at_precision(self.options.matmul_precision):
          generation = pool.decode(self.weights, batches, level, encode)
      else:
        encoded, active = encode(batches[0]), batches[0].active
        decode = functools.partial(self.decode, encoded, active, level, rule)
        generation = clock.run("decode", decode)
      for i, row in enumerate(np.concatenate([batch.rows for batch in batches])):
        items[int(row)] = self.output(generation, i, batches[0].tokens.shape[1])
    progress(len(texts), len(texts))
    seconds, programs = clock.seconds, compiled.num_made() - made
    timing = outputs_lib.Timing(
      seconds["encode"], seconds["decode"], programs, clock.compile_seconds
    )
    in_order = tuple(items[row] for row in range(len(texts)))
    return outputs_lib.Outputs(in_order, self.num_layers, threshold, None, timing)

  def output(
    self, generation: loop.Generation, row: int, input_length: int = 0
  ) -> outputs_lib.Output:
    """One row of a generation as text with its exits; see `outputs.from_generation`."""
    return outputs_lib.from_generation(
      generation,
      row,
      self.vocabulary,
      num_layers=self.num_layers,
      eos_id=self.eos_id,
      input_length=input_length,
    )
