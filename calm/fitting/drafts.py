"""Whether full depth is served from the model's own drafts, and how its head is read then."""

import dataclasses
from collections.abc import Sequence

from calm import inference
from calm.calibrate import seconds
from calm.fitting import reading
from calm.inference import result_cache


def fastest(
  predictor: inference.Predictor, texts: Sequence[str], cache: result_cache.ResultCache
) -> tuple[inference.Predictor, seconds.Seconds | None]:
  """The model that decodes its full texts fastest, one at a time, and its measured seconds.

  A pass over drafts asks the head about several positions, of which 8 bits save more time than
  of one: where a large head is as fast either way at full depth, it may not be so here. The
  texts are the same.

  Args:
    predictor: the model.
    texts: prompts to time.
    cache: of what was measured before.

  Returns:
    The model, and its seconds from drafts beside full depth as `predictor` decodes it;
    `predictor` and None where drafts are not faster, there is one layer only, or states are
    rounded to few bits.
  """
  if predictor.num_layers == 1 or not inference.can_be_exact(predictor):
    return predictor, None
  rule, best, least = inference.exact_rule(predictor), (predictor, None), 1.0
  for model in _models(predictor):
    found = cache.get(
      seconds.Seconds,
      "exact" if model is predictor else "exact_in_8_bits",
      {
        "procedure": model.procedure.to_json(),
        "head": model.options.head_dtype,
        "beside": predictor.options.head_dtype,
        "rule": dataclasses.asdict(rule),
      },
      lambda model=model: inference.seconds.measure(
        model, texts, 1.0, rule=rule, base=predictor
      ),
    )
    if not found.slower and found.single.speedup > least:
      best, least = (model, found), found.single.speedup * reading.MARGIN
  return best


def _models(predictor: inference.Predictor) -> tuple[inference.Predictor, ...]:
  """The model as it is, and with its head in 8 bits where that may be faster."""
  if reading.nothing_to_gain(predictor, "head_dtype"):
    return (predictor,)
  return predictor, reading.with_option(predictor, "head_dtype")
