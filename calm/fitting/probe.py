"""What every layer would say at every token of the full model's texts, and how sure it is.

One teacher-forced pass. Caches hold the states that were computed, not those an early exit
would have propagated, so that this ranks ways of leaving; the few that rank best are decoded.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import inference
from calm.calibrate import Record
from calm.exits import confidence, evidence
from calm.inference import offline
from calm.t5 import network, parameters

_BATCH = 16
_BUCKET = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
  """Tokens of the full model's texts, in one row after another.

  Attributes:
    confidences: measure -> [num_tokens, num_layers] in [0, 1].
    agrees: [num_tokens, num_layers] whether the layer's argmax is the last layer's.
    rows: [num_tokens] the text that a token belongs to.
    positions: [num_tokens] its position there.
  """

  confidences: Mapping[str, np.ndarray]
  agrees: np.ndarray
  rows: np.ndarray
  positions: np.ndarray

  @property
  def num_layers(self) -> int:
    return self.agrees.shape[1]


def probe(
  predictor: inference.Predictor,
  texts: Sequence[str],
  full: Sequence[Record],
  measures: Sequence[str],
  progress: Callable[[float, str], None],
) -> Probe:
  """Reads every layer at every token of the full-depth records.

  Args:
    predictor: the model.
    texts: [num_prompts] prompts.
    full: [num_prompts] their full-depth records.
    measures: their names, but 'shortlist', which says what 'softmax' says.
    progress: told of batches.
  """
  one = offline.one_shape(predictor.with_options(batch_size=_BATCH))
  longest = max(len(record.tokens or ()) for record in full)
  found: list[tuple[np.ndarray, ...]] = []
  batches = one.plan(texts)
  for number, batch in enumerate(batches):
    rows = [full[int(row)].tokens or () for row in batch.rows]
    # One length for all: compiling another takes longer than reading some padding.
    targets = np.zeros(
      (len(batch.tokens), -(-longest // _BUCKET) * _BUCKET or _BUCKET), np.int32
    )
    for i, tokens in enumerate(rows):
      targets[i, : len(tokens)] = tokens
    read = _read(
      predictor.config,
      tuple(measures),
      predictor.vocabulary.vocab_size,
      tuple(predictor.options.shortlist or ()),
      predictor.params,
      batch.tokens,
      targets,
    )
    layers = [np.asarray(array) for array in read]
    for i, tokens in enumerate(rows):
      count, row = len(tokens), int(batch.rows[i])
      columns = [array[:, i, :count].T for array in layers]
      found.append((*columns, np.full(count, row), np.arange(count)))
    progress(
      (number + 1) / len(batches), f"reading layers, batch {number + 1} of {len(batches)}"
    )
  agrees, *confidences, rows, positions = (
    np.concatenate(part) for part in zip(*found, strict=True)
  )
  return Probe(dict(zip(measures, confidences, strict=True)), agrees, rows, positions)


def _read(config, measures, num_pieces, shortlist, params, inputs, targets):
  return _compiled(config, measures, num_pieces, shortlist)(params, inputs, targets)


def _compiled(config: network.T5Config, measures, num_pieces: int, shortlist):
  key = (config, measures, num_pieces, shortlist)
  if key not in _PROGRAMS:
    _PROGRAMS.clear()  # one model at a time
    _PROGRAMS[key] = jax.jit(_reader(*key))
  return _PROGRAMS[key]


_PROGRAMS: dict = {}


def _reader(
  config: network.T5Config,
  measures: tuple[str, ...],
  num_pieces: int,
  shortlist: tuple[int, ...],
):
  module = network.Transformer(config)

  def read(params, inputs, targets):
    shifted = jnp.concatenate([jnp.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1)
    states: Any = module.apply({"params": params}, inputs, shifted, targets, method=_states)
    hidden, normed = states
    heads = parameters.head_kernels(params, config)
    last = None
    columns = []
    for layer in range(config.num_decoder_layers - 1, -1, -1):
      head = heads[layer] if config.per_layer_heads else heads[0]
      logits = (normed[layer].astype(jnp.float32) @ head)[..., :num_pieces]
      best = jnp.argmax(logits, axis=-1)
      last = best if last is None else last
      listed = lambda layer=layer, head=head: (
        normed[layer].astype(jnp.float32) @ head[:, np.asarray(shortlist, int)]
      )
      previous = hidden[layer - 1] if layer else jnp.zeros_like(hidden[0])
      view = confidence.LayerView(
        layer + 1,
        hidden[layer],
        previous,
        logits=lambda logits=logits: logits,
        exit_logit=lambda layer=layer: _exit_logit(params, normed[layer]),
        shortlist_logits=listed,
        previous_shortlist_logits=lambda listed=listed, layer=layer: listed(layer - 1),
        probe_logit=lambda layer=layer, previous=previous, listed=listed: _probe_logit(
          params, layer + 1, hidden[layer], previous, normed[layer], listed()
        ),
      )
      columns.append((best == last, *(confidence.measure(name)(view) for name in measures)))
    return tuple(jnp.stack(part) for part in zip(*columns[::-1], strict=True))

  return read


def _states(module: network.Transformer, inputs, shifted, targets):
  """Raw residuals of every layer and what its head reads."""
  hidden = module.hidden_states(inputs, shifted, targets)
  return hidden, module.decoder.read(hidden)


def _probe_logit(params, layer: int, hidden, previous, normed, listed):
  probes = parameters.probes(params)
  assert probes is not None  # `candidates.measures` asked
  if layer == probes.num_layers:
    return jnp.full(hidden.shape[:-1], evidence.CERTAIN)
  return probes.logit(layer, normed, evidence.evidence(hidden, previous, listed))


def _exit_logit(params, normed):
  classifier = params["decoder"]["exit_classifier"]
  return (normed.astype(jnp.float32) @ classifier["kernel"])[..., 0] + classifier["bias"][0]
