"""Seconds of full depth and of calibrated exits, measured in turn on the same prompts."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from calm import exits
from calm.calibrate.seconds import Pair, Seconds
from calm.data import prompt_batches
from calm.exits import schedules
from calm.inference import drafts

if TYPE_CHECKING:  # the predictor itself measures
  from calm.inference import predictor as predictor_lib

PROMPTS, ROUNDS = 24, 5


def measure(
  predictor: "predictor_lib.Predictor",
  texts: Sequence[str],
  threshold: float,
  *,
  prompts: int | None = None,
  rounds: int | None = None,
  rule: exits.Rule | None = None,
  base: "predictor_lib.Predictor | None" = None,
  progress: Callable[[float, str], None] = lambda share, text: None,
) -> Seconds:
  """Times a rule at a threshold against the static full-depth program.

  Args:
    predictor: the model under its options.
    texts: prompts; those of the commonest padded length are timed.
    threshold: lambda.
    prompts: most prompts that are timed one at a time; batches take four batches of them.
    rounds: times that each is decoded, after one uncounted that compiles.
    rule: how tokens go through the layers; None is the model's own.
    base: the model that decodes at full depth; None: the `reference` of `predictor`.
    progress: told of the share done.
  """
  prompts, rounds = prompts or PROMPTS, rounds or ROUNDS
  way = (rule or predictor.options.rule, threshold)
  size, base = predictor.options.batch_size, base or predictor.reference
  alone = predictor.with_options(batch_size=1)
  models = (alone if base is predictor else base.with_options(batch_size=1), alone)
  told = lambda share, text: progress(0.6 * share, f"one at a time, {text}")
  single = _pair(models, texts, way, prompts, rounds, told)
  assert single is not None  # one prompt is a whole batch
  told = lambda share, text: progress(0.6 + 0.4 * share, f"batches of {size}, {text}")
  models = (base, predictor)
  batched = _pair(models, texts, way, 4 * size, rounds, told) if size > 1 else None
  return Seconds(single, batched)


def exactly(
  predictor: "predictor_lib.Predictor", texts: Sequence[str], rule: exits.Verified
) -> Pair | None:
  """Times exact decoding against full depth in the model's own batches, on a few prompts.

  Args:
    predictor: the model under its options.
    texts: prompts; those of the commonest padded length are timed.
    rule: how drafts are made and verified.

  Returns:
    Milliseconds of both and their ratio; None where the prompts fill no batch.
  """
  few = 2 * predictor.options.batch_size
  told = lambda share, text: None
  way = (rule, schedules.NEVER_EXIT)
  return _pair((predictor, predictor), texts, way, few, 3, told)


def _pair(models, texts, way, most: int, rounds: int, progress) -> Pair | None:
  """Full depth of the first model and `way` of the second, batch by batch.

  None where there is no whole batch of one length.
  """
  batches = _of_one_length(models[1], texts, most)
  if not batches:
    return None
  ways = ((exits.StaticExit(), schedules.NEVER_EXIT), way)
  coders = models[1:] if _encoder(models[0]) == _encoder(models[1]) else models
  encoder = np.zeros((rounds + 1, len(coders), len(batches)))
  seconds = np.zeros((rounds + 1, len(ways), len(batches)))
  # Round by round: a text that is drafted begins with what those before it had accepted.
  for repeat in range(rounds + 1):
    for number, batch in enumerate(batches):
      encoded = []
      for column, model in enumerate(coders):
        start = time.perf_counter()
        encoded.append(jax.block_until_ready(model.encode(batch)))
        encoder[repeat, column, number] = time.perf_counter() - start
      for column in (0, 1) if repeat % 2 else (1, 0):
        rule, level = ways[column]
        drafts.are_due(models[column])
        start = time.perf_counter()
        models[column].decode(encoded[column % len(coders)], batch.active, level, rule)
        seconds[repeat, column, number] = time.perf_counter() - start
      done = (repeat + (number + 1) / len(batches)) / (rounds + 1)
      progress(done, f"round {repeat + 1} of {rounds + 1}")
  # The first round compiled. Of the others the fastest counts, batch by batch: what else the
  # machine does only ever adds.
  full, early = np.min(seconds[1:], axis=0).sum(axis=1)
  encoders = np.min(encoder[1:], axis=0).sum(axis=1)
  count = len(batches) * len(batches[0].rows)
  return Pair(
    batch_size=len(batches[0].active),
    num_prompts=count,
    full=1e3 * float(full) / count,
    early=1e3 * float(early) / count,
    speedup=float(full / early),
    end_to_end=float((full + encoders[0]) / (early + encoders[-1])),
  )


def _encoder(predictor: "predictor_lib.Predictor") -> tuple[str | None, ...]:
  """What the seconds of an encoder depend on."""
  options = predictor.options
  return predictor.config.dtype, options.weights_dtype, options.encoder_dtype


def _of_one_length(predictor, texts, most: int) -> list[prompt_batches.PromptBatch]:
  """Whole batches of the commonest padded length."""
  batches = [batch for batch in predictor.plan(texts) if batch.active.all()]
  if not batches:
    return []
  lengths = np.array([batch.tokens.shape[1] for batch in batches])
  common = np.bincount(lengths).argmax()
  same = [batch for batch, length in zip(batches, lengths, strict=True) if length == common]
  return same[: max(1, most // len(same[0].active))]
