"""The last part: seconds, risk and quality, looked at once, after everything is decided."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from calm import exits, inference
from calm.calibrate import Prompt, Record, generations
from calm.calibrate import thresholds as thresholds_lib
from calm.calibrate.losses import metrics, sequence_losses
from calm.fitting import choose
from calm.fitting import result as result_lib
from calm.fitting.options import FitOptions
from calm.inference import offline
from calm.paper.bench import scores

Progress = Callable[[float, str], None]
EXAMPLES = 6
_NORMAL = 1.96


def mean(values: np.ndarray) -> result_lib.Mean:
  """Mean and 95 % interval of values, one a prompt."""
  spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
  margin = _NORMAL * spread / len(values) ** 0.5
  return result_lib.Mean(float(values.mean()), margin, len(values))


def quality(
  records: Sequence[Record], prompts: Sequence[Prompt], metric: metrics.MetricLike
) -> result_lib.Mean | None:
  """Mean metric against references; None where a prompt has none."""
  if not all(prompt.targets for prompt in prompts):
    return None
  references = [prompt.targets for prompt in prompts]
  return mean(scores.similarities(records, references, metric))


@dataclasses.dataclass(frozen=True)
class Look:
  """The last part decoded.

  Attributes:
    last: what was measured.
    examples: prompts of it, with the texts that are served.
    worse: why the quality of the trained weights forbids to serve them; '' where it does not.
  """

  last: result_lib.LastLook
  examples: tuple[result_lib.ShownText, ...]
  worse: str = ""


def look(
  predictor: inference.Predictor,
  original: inference.Predictor | None,
  prompts: Sequence[Prompt],
  options: FitOptions,
  threshold: float,
  progress: Progress,
) -> Look:
  """Decodes the last part at full depth and under the threshold.

  Where full depth is served, or training has made it worse, the texts are the original's.

  Args:
    predictor: the trained model, under the options that are certified.
    original: the model before training; None where nothing was trained.
    prompts: the last part.
    options: what the fit is asked for.
    threshold: served; `NEVER_EXIT` for full depth.
    progress: told of the share done.
  """
  static = exits.StaticExit()
  # The batches that certified: their programs are compiled.
  predictor = offline.in_bulk(predictor)
  full = offline.with_rule(predictor, prompts, static, progress=choose.part(progress, 0.0, 0.3))
  before = full
  if original is not None:
    told = choose.part(progress, 0.3, 0.6)
    before = offline.with_rule(offline.in_bulk(original), prompts, static, progress=told)
  quality_original = quality(before, prompts, options.metric)
  quality_full = quality(full, prompts, options.metric)
  worse = "" if options.accept_quality else why_worse(quality_original, quality_full, options)
  if original is not None and (worse or not np.isfinite(threshold)):
    predictor, full, threshold = original, before, thresholds_lib.NEVER_EXIT
  early = full
  if np.isfinite(threshold):
    told = choose.part(progress, 0.6, 1.0)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      levels = (threshold,)
      made = offline.on_grid(predictor, prompts, levels, path, full=full, progress=told)
    early = made.records[0]
  exit_quality = quality(early, prompts, options.metric) if np.isfinite(threshold) else None
  found = result_lib.LastLook(
    quality_original=quality_original,
    quality_full=quality_full,
    quality_early=exit_quality,
    risk=risk(prompts, full, early, options) if np.isfinite(threshold) else None,
    layers=scores.mean_layers(early),
  )
  shown = [_example(predictor, *row) for row in zip(prompts, full, early, strict=True)]
  return Look(found, tuple(shown[:EXAMPLES]), worse)


def why_worse(
  original: result_lib.Mean | None, trained: result_lib.Mean | None, options: FitOptions
) -> str:
  """Why trained weights are not served: their quality is below the original's interval."""
  if original is None or trained is None or trained.value >= original.value - original.margin:
    return ""
  return (
    f"training made full depth worse ({options.metric} {trained} against references on the last"
    f" part, {original} before); `accept_quality` serves the trained weights all the same."
  )


def risk(prompts, full, early, options: FitOptions) -> result_lib.Mean:
  """The controlled loss on these prompts."""
  pair = generations.Generations(
    tuple(prompts), np.array([0.5]), (tuple(early),), tuple(full)
  )  # one column: the threshold is only its name
  metric = metrics.get_metric(options.metric)
  return mean(sequence_losses.prefix_losses(pair, options.kind, metric=metric)[0])


def _example(predictor, prompt: Prompt, full: Record, early: Record) -> result_lib.ShownText:
  tokens = early.tokens or ()
  return result_lib.ShownText(
    prompt=prompt.input,
    reference=prompt.targets[0] if prompt.targets else "",
    full=full.prediction,
    text=early.prediction,
    pieces=tuple(
      "⏎" if token == predictor.eos_id else predictor.vocabulary.piece(token)
      for token in tokens
    ),
    exit_layers=early.exit_layers or (),
    confidences=early.confidences or (),
  )
