"""A model that decodes prompts under its promise.

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
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from calm import arguments, checkpoints, exits
from calm.calibrate import NEVER_EXIT, Calibration, Online, Prompt, ledger, metrics
from calm.calibrate import display as calibration_display
from calm.calibrate import seconds as seconds_lib
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.generations.procedure import describe_differences
from calm.calibrate.losses import UNKNOWN
from calm.checkpoints import files
from calm.console import Progress, sanitize
from calm.data import prompt_batches, prompt_files
from calm.decode import compiled, pool, sharded
from calm.exits import schedules
from calm.inference import certified, grid, outputs, timing
from calm.inference import options as options_lib
from calm.inference.batch_decoder import BatchDecoder, can_be_exact
from calm.t5 import caches, limits

# What a folder with a promise holds beside the model.
CALIBRATION = "calibration.json"
# Or this, where full depth is what it should be served with.
FULL_DEPTH = "full_depth.json"
# Of the time that it takes to certify and to time, the share that decoding has.
_DECODING = 0.9


class SlowerThanFullDepth(UserWarning):
  """A threshold is served that was measured not to be faster than the full model."""


class UntrainedExits(UserWarning):
  """No decoder layer but the last has learned to write tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor(BatchDecoder):
  """A model ready to decode, and its promise.

  Attributes:
    config: the model's sizes.
    params: its T5X-shaped parameter tree.
    vocabulary: text <-> ids.
    options: how prompts are decoded.
    calibration: carries the promise, or None.
    threshold: what `generate` decodes with where it is given none; a calibration's.
    exact: how full depth is decoded where that was measured to be faster; None: static.
    one_shape: whether every batch is padded to one shape (`BatchDecoder`).
  """

  calibration: Calibration | None = None
  threshold: float | None = None
  exact: exits.Speculative | None = None

  def with_options(self, **options: Any) -> "Predictor":
    """The same model under other options and without a calibration."""
    other = dataclasses.replace(self, calibration=None, threshold=None, exact=None)
    return super(Predictor, self.sharing(other)).with_options(**options)

  @arguments.checked()
  def under(self, calibration: Calibration, *, allow_platform: bool = False) -> "Predictor":
    """The same model under a calibration: its threshold is the default, its promise goes along.

    Args:
      calibration: for this procedure.
      allow_platform: take one that was made on another platform or with another matmul
        precision too; outputs then carry no promise (`platform_mismatch` says why).

    Warns (`SlowerThanFullDepth`) where its threshold was measured not to be faster.

    Raises:
      ValueError: the calibration is for another procedure; the message names the fields.
    """
    calibration.refuse_other(self.procedure, allow_platform=allow_platform)
    if slow := seconds_lib.warning(calibration):
      warnings.warn(SlowerThanFullDepth(slow), stacklevel=3)
    return self.sharing(
      dataclasses.replace(self, calibration=calibration, threshold=calibration.threshold)
    )

  @functools.cached_property
  def platform_mismatch(self) -> str:
    """The fields of the platform that differ from the calibration's; '' where none does."""
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
      progress: told of the share that is done, and what is being done; None shows it where
        someone looks on.

    Returns:
      A predictor whose `generate` needs no threshold; the promise is in `calibration`, and the
      seconds that were measured beside full depth in its notes (`calibrate.seconds.of`).
    """
    prompts = prompt_files.prompts_of(prompts)
    with contextlib.ExitStack() as stack:
      shown = progress or stack.enter_context(Progress())
      calibration, _ = certified.certify(
        self,
        prompts,
        tolerance=tolerance,
        error_rate=error_rate,
        consistency=consistency,
        metric=metric,
        thresholds=thresholds,
        folder=folder,
        progress=lambda share, text: shown(_DECODING * share, text),
      )
      if folder is not None and (seen := ledger.keep(folder, calibration, prompts)):
        warnings.warn(seen, stacklevel=3)
      if calibration.certified:
        found = timing.beside_full_depth(
          self,
          [prompt.input for prompt in prompts],
          calibration.threshold,
          prompts=8,
          rounds=3,
          progress=lambda share, text: shown(
            _DECODING + (1 - _DECODING) * share, f"timing {text}"
          ),
        )
        calibration = seconds_lib.noted(calibration, found)
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
    """A state for `generate(online=...)`: the threshold is calibrated while prompts are served.

    Args:
      path: its file, which a later run goes on with; None keeps it in memory.
      tolerance: delta, of the mean distance to the full model's text, in (0, 1).
      error_rate: epsilon, in (0, 1).
      metric: name or import path of the text metric.
      thresholds: strictly descending; None takes the model's grid, or the measure's own.
      **options: of `calibrate.Online`, as `share`.

    Raises:
      ValueError: an argument has no meaning, or the file is another's.
    """
    return certified.open_online(
      self, path, metric, thresholds, tolerance=tolerance, error_rate=error_rate, **options
    )

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
  ) -> outputs.Outputs:
    """Decodes prompts greedily.

    Args:
      texts: the prompts, without task prefix.
      threshold: lambda in [0, 1], or `schedules.NEVER_EXIT` ('never'). None takes the one
        of the calibration; any other carries no promise. `NEVER_EXIT` runs the full-depth
        program of `reference`, which pays for no confidence.
      rule: another way through the layers: `exits.StaticExit(k)`, `exits.OracleExit()`, which
        have no threshold, or `exits.Speculative(k)`, which is the full model's own text (with a
        `threshold` of 1 - lambda below 1: but for drafts that are likely enough).
      online: a state of `Predictor.online`: its threshold is taken, and the prompts that it
        draws are decoded at full depth and at its open thresholds too.
      ids: [num_texts] names by which `online` draws each prompt, or cluster of prompts, once;
        None takes the texts.
      progress: told how many prompts are done of how many; None shows it where someone looks
        on (a terminal or a notebook) and it takes long.

    Raises:
      ValueError: there is neither a threshold nor a calibration nor a rule without one, or an
        argument has no meaning.
      TypeError: `texts` is no list of texts.
    """
    texts = prompt_files.check_texts(texts)
    if online is not None:
      if threshold is not None or rule is not None:
        raise ValueError("`online` needs neither `threshold` nor `rule`; leave these out.")
      return certified.serve_online(self, online, texts, ids, progress)
    if threshold is None and rule is None:
      threshold = self.threshold
      if threshold is None:
        raise ValueError(
          "Expected `threshold`, or a model loaded with a `calibration`, got neither; pass a"
          " number in [0, 1], or calm.exits.schedules.NEVER_EXIT for the full model."
        )
    if threshold is not None:
      schedules.check_threshold(threshold)
    if rule is not None:
      rule.depth(self.num_layers)  # the rule's own check of its layers
    full = rule is None and threshold == NEVER_EXIT
    with contextlib.ExitStack() as stack:
      report = progress or stack.enter_context(Progress()).count("prompts")
      decoded = (self.reference if full else self)._decode_texts(
        texts, threshold, rule or self.served_rule(threshold), report
      )
    calibrated = None if rule is not None else self.calibration
    if calibrated is None or threshold != calibrated.threshold or self.platform_mismatch:
      return decoded
    return dataclasses.replace(decoded, guarantee=calibrated.guarantee)

  def served_rule(self, threshold: float | None) -> exits.Rule | None:
    """The rule that `generate` runs a threshold with: None is the options' own.

    Where no token can leave early, no confidence is asked for: that is the full-depth program.
    """
    return (self.exact or exits.StaticExit()) if threshold == NEVER_EXIT else None

  def _decode_texts(
    self,
    texts: Sequence[str],
    threshold: float | None,
    rule: exits.Rule | None,
    progress: Callable[[int, int], None],
  ) -> outputs.Outputs:
    """Prompts through batches or a pool of rows, in the order of the list and timed."""
    programs, clock, begun = compiled.num_made(), timing.Clock(), 0

    def encode(batch: prompt_batches.PromptBatch) -> caches.Encoded:
      nonlocal begun
      progress(begun, len(texts))  # those before it are done, or nearly in a pool
      begun += len(batch.rows)
      with clock.phase("encode"):
        return jax.block_until_ready(self.encode(batch))

    level = NEVER_EXIT if threshold is None else threshold
    items: dict[int, outputs.Output] = {}
    # Rows of passes over drafts have positions of their own.
    pooled = self.options.refill and not (rule or self.options.rule).speculates
    for batches in prompt_batches.together(self.plan(texts), pooled=pooled):
      first = batches[0]
      if len(batches) > 1:
        rows = pool.PoolProgram(self.program(rule))
        with clock.phase("decode"), compiled.at_precision(self.options.matmul_precision):
          generation = rows.decode(self.weights, batches, level, encode)
      else:
        encoded = encode(first)
        with clock.phase("decode"):
          generation = self.decode(encoded, first.active, level, rule)
      for i, row in enumerate(np.concatenate([batch.rows for batch in batches])):
        items[int(row)] = self.output(generation, i, first.tokens.shape[1])
    progress(len(texts), len(texts))
    spent = clock.seconds["encode"], clock.seconds["decode"]
    seconds = outputs.Timing(*spent, compiled.num_made() - programs, clock.compile_seconds)
    in_order = tuple(items[row] for row in range(len(texts)))
    return outputs.Outputs(in_order, self.num_layers, threshold, None, seconds)

  def __repr__(self) -> str:
    """Sizes, what it decodes with and, on a line of its own, the promise."""
    config, made = self.config, self.calibration
    layers = f"{config.num_encoder_layers} + {config.num_decoder_layers} layers"
    first = f"{layers}, emb_dim {config.emb_dim}, {config.dtype}; {self._way}"
    if made is None:
      return f"Predictor({first})"
    promise = "none, no threshold is certified"
    if made.certified:
      metric = "" if made.metric == UNKNOWN else f" by {sanitize(made.metric)}"
      promise = (
        f"{made.promise.name} {calibration_display.loss_name(made)} at most"
        f" {made.tolerance:g}{metric} (error rate {made.error_rate:g},"
        f" {made.num_examples} prompts)"
      )
    return f"Predictor({first},\n  promise: {promise})"

  @property
  def _way(self) -> str:
    """Like `softmax at layers 2, 4, threshold 0.35`."""
    level, layers = self.threshold, self.options.exit_layers
    if level == NEVER_EXIT:
      return self.exact.description if self.exact else "full depth"
    where = "every layer" if layers is None else f"layers {', '.join(map(str, layers))}"
    at = "" if level is None else f", threshold {thresholds_lib.format_threshold(level)}"
    return f"{self.options.measure} at {where}{at}"


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
    path: a checkpoint directory of any format that `checkpoints.load` knows, or 'packed' for
      the small model inside this package.
    calibration: a `Calibration` or its JSON file. Its procedure sets the options that are not
      given; a model or an option that differs from it is refused. None takes the
      `calibration.json` of the model's own folder, where there is one and no option that is
      given differs from it.
    void_guarantee: decode under another procedure all the same: the calibrated threshold
      stays, the promise goes.
    allow_platform: decode all the same where the calibration differs in nothing but the
      platform that it was made on and its matmul precision. Outputs carry no promise; with
      `generate(online=...)` this platform earns one of its own.
    dtype: activation dtype, 'float32' or 'bfloat16'; None takes the checkpoint's.
    exits: a file of exits that `calm fit` learned beside this model's weights, or the folder
      that it wrote; None takes the model folder's own, where there is one.
    **options: fields of `DecodeOptions`.

  Raises:
    ValueError: the calibration is for another procedure (the message names the fields), or the
      checkpoint has no vocabulary.
  """
  sharded.make_cpu_devices(options.get("num_devices"))
  directory = checkpoints.PACKED if str(path) == "packed" else pathlib.Path(path)
  checkpoint = checkpoints.load(directory, exits=exits)
  if checkpoint.vocabulary is None:
    raise ValueError(
      f"Expected a vocabulary beside the checkpoint in {directory}, got none; save the model"
      " with one (`checkpoints.save(..., vocabulary=...)`)."
    )
  if isinstance(calibration, str | pathlib.Path):
    calibration = Calibration.load(calibration)
  stored = options_lib.stored_options(directory)
  procedure = None if calibration is None else calibration.procedure
  if procedure is None:
    base = options_lib.DecodeOptions(**stored)
  else:
    base = options_lib.options_of(procedure, stored.get("shortlist"))
    dtype = dtype or procedure.activation_dtype
  config = checkpoint.config
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype)
  changed = options_lib.change(config, base, **options)
  predictor = Predictor(config, checkpoint.params, checkpoint.vocabulary, changed)
  if calibration is not None and void_guarantee:
    return dataclasses.replace(predictor, threshold=calibration.threshold)
  if calibration is not None:
    return predictor.under(calibration, allow_platform=allow_platform)
  own, full_depth = directory / CALIBRATION, directory / FULL_DEPTH
  given = bool(options) or dtype is not None
  if own.exists() and not void_guarantee:
    return _under_own(predictor, own, given, allow_platform)
  if full_depth.exists():
    exact = None if given or not can_be_exact(predictor) else stored_rule(full_depth)
    return dataclasses.replace(predictor, threshold=NEVER_EXIT, exact=exact)
  if checkpoint.exits_trained is False and not config.exit_translators and not own.exists():
    warnings.warn(
      UntrainedExits(
        f"the exits of {directory} were never trained: only its last decoder layer has learned"
        " to write, so tokens that leave before it are often wrong. Train them (`calm fit`, or"
        " `calm train`), or decode at full depth (the threshold 'never')."
      ),
      stacklevel=3,
    )
  return predictor


def _under_own(
  predictor: Predictor, path: pathlib.Path, options_given: bool, allow_platform: bool
) -> Predictor:
  """The model under the calibration of its own folder, or bare under options of a user's."""
  calibration = Calibration.load(path)
  compare = functools.partial(describe_differences, calibration.procedure, predictor.procedure)
  difference = compare(allow_platform=allow_platform)
  if not difference:
    return predictor.under(calibration, allow_platform=allow_platform)
  if not compare(allow_platform=True):  # the same options, at another place
    calibration.refuse_other(predictor.procedure)
  if not options_given:  # the folder disagrees with itself
    raise ValueError(
      f"Expected {str(path)!r} to be for the model beside it, got one for another procedure:"
      f" {difference}; calibrate again, or take the file away to decode without a promise."
    )
  return predictor


def stored_rule(path: pathlib.Path) -> exits.Speculative | None:
  """The rule that a folder's `full_depth.json` names, where it was measured to be faster.

  Raises:
    ValueError: the file is damaged (names it).
  """
  stored = files.read_json(path).get("exact")
  if stored is None:
    return None
  known = {field.name for field in dataclasses.fields(exits.Speculative)}
  with files.naming(path):
    if not isinstance(stored, dict) or set(stored) != known:
      raise ValueError(f"Expected `exact` to have {sorted(known)}, got {stored!r}.")
    limits.whole("draft_layer", stored["draft_layer"], 1, limits.SIZES["num_decoder_layers"][1])
    limits.whole("num_drafts", stored["num_drafts"], 1, limits.LONGEST)
    return exits.Speculative(**stored)
