"""A check, by the model's own loss, that a tokenizer is the model's.

The ids of another model's tokenizer exist and mean something else. To the model they are as
good as ids exchanged at random among those about as frequent (SentencePiece numbers pieces by
frequency, so that ids of one power of two are). With its own tokenizer that exchange costs a
model several nats a token, whatever it was trained for.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from calm import inference
from calm.calibrate import Prompt
from calm.t5 import network, parameters
from calm.t5.network import Params

# Nats a token. The packed model gains 2.3 to 4.6 on its three tasks with its own tokenizer, and
# 1.9 to 2.1 on tasks and on letters that it never saw; at most 0.7 with those of others.
LEAST_GAIN = 1.0
_ROWS, _BATCH, _INPUT, _TEXT, _EXCHANGES = 32, 8, 128, 32, 3


def warning(predictor: inference.Predictor, rows: Sequence[Prompt]) -> str:
  """A warning where the tokenizer is probably not the model's; else ''.

  Of a model that was never trained nothing can be told.

  Args:
    predictor: the model with its tokenizer and prefix.
    rows: texts; references are read where there are some, and the ends of inputs.
  """
  if never_trained(predictor):
    return ""
  prefix, chosen = predictor.options.task_prefix, rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
  middles = [(row.input, len(row.input) // 2) for row in chosen]
  halves = [(text[:middle], text[middle:]) for text, middle in middles]
  pairs = [(prefix + row.input, row.targets[0]) for row in chosen if row.targets]
  found = [losses(predictor, each) for each in (pairs, halves) if each]
  own, exchanged = max(found, key=lambda pair: pair[1] - pair[0], default=(0.0, LEAST_GAIN))
  if exchanged - own >= LEAST_GAIN:
    return ""
  return (
    "The tokenizer is probably not the model's: on its tokens the model loses"
    f" {own:.1f} nats each, and {exchanged:.1f} with others in their place, where a"
    f" model that knows its tokens loses {LEAST_GAIN:g} more at least. Put the tokenizer that"
    " it was trained with into its folder; go on if it was hardly trained, or never on such"
    " texts."
  )


def never_trained(predictor: inference.Predictor) -> bool:
  """Whether every scale of a layer norm still has its initial value, 1."""
  flat = parameters.flatten(predictor.params)
  scales = [np.asarray(x) for path, x in flat.items() if path.endswith("/scale")]
  return all(np.all(scale == 1.0) for scale in scales)


def losses(
  predictor: inference.Predictor, pairs: Sequence[tuple[str, str]]
) -> tuple[float, float]:
  """Nats a token of the second texts after the first ones: (as they are, exchanged)."""
  vocabulary, eos_id = predictor.vocabulary, predictor.eos_id
  inputs, texts = (
    np.array(
      [
        [*kept, eos_id, *[0] * (length - 1 - len(kept))]
        for kept in (vocabulary.encode(pair[column])[: length - 1] for pair in pairs)
      ],
      np.int32,
    )
    for column, length in ((0, _INPUT), (1, _TEXT))
  )
  loss = functools.partial(_loss, predictor.config, predictor.params)

  def mean(inputs, texts):
    parts = [slice(i, i + _BATCH) for i in range(0, len(texts), _BATCH)]
    total = sum(float(loss(inputs[part], texts[part])) for part in parts)
    return total / float(np.sum(texts > 0))

  kept = {0, eos_id, vocabulary.unk_id}
  others = [exchange(vocabulary.vocab_size, kept, seed) for seed in range(_EXCHANGES)]
  exchanged = np.mean([mean(other[inputs], other[texts]) for other in others])
  return mean(inputs, texts), float(exchanged)


@functools.partial(jax.jit, static_argnums=0)
def _loss(config: network.T5Config, params: Params, inputs: jax.Array, texts: jax.Array):
  """Nats of the texts [rows, length] after their inputs, in all, []."""
  net = network.Transformer(config)
  shifted = jnp.pad(texts[:, :-1], ((0, 0), (1, 0)))
  logits = net.apply({"params": params}, inputs, shifted, texts, enable_dropout=False)
  logits = jnp.asarray(logits, jnp.float32)
  named = jnp.take_along_axis(logits, texts[..., None], axis=-1)[..., 0]
  return jnp.sum(jnp.where(texts > 0, jax.nn.logsumexp(logits, axis=-1) - named, 0.0))


def exchange(size: int, kept: set[int | None], seed: int) -> np.ndarray:
  """Other ids for ids, [size]: drawn among those of the same power of two."""
  rng, order = np.random.default_rng(seed), np.arange(size)
  for power in range(size.bit_length()):
    ids = [i for i in range(2**power, min(2 ** (power + 1), size)) if i not in kept]
    order[ids] = rng.permutation(ids)
  return order
