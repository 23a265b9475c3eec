"""Exits learned beside frozen weights: translators, learned propagation,
confidence heads.

From the states d^i of every decoder layer at the full model's own texts, with x
= decoder_norm(d^j) at exit layer j, two linear maps are fitted:

- the *translator* of layer j (tuned lens, Belrose et al. 2023): head(x + x A_j
  + b_j) predicts the full model's probabilities. A_j starts at the ridge
  regression of the last layer's x and is then trained by cross entropy;
- *learned propagation* from layer j to a skipped layer k: its input d^{k-1} is
  predicted as d^j + [x; 1] D_j U_jk, by reduced-rank regression: the `rank`
  columns of D_j serve all k.

On held-out texts, the exit classifier and a probe a layer learn by logistic
regression whether the layer's token is the full model's. Memory is bounded:
normal equations, a sample of states.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from calm import inference
from calm.console import Report
from calm.data import prompt_batches
from calm.exits import confidence
from calm.exits import layers as layers_lib
from calm.inference.grid import part
from calm.t5 import network, parameters

_Maps = list[tuple[np.ndarray, np.ndarray]]

# Texts that the full model reads at a time, and the multiple that their length
# is padded to.
BATCH = 16
_BUCKET = 8
_SAMPLE_BYTES = 2**29
# Share of the sampled texts that no map is fitted to. They choose the penalty
# and the last step, and train classifier and probes: maps agree too often with
# their own tokens.
_HELD_OUT = 0.25
_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Tokens of a training step; steps; steps between two evaluations, and how many
# of these may pass without a better loss.
_STEP_TOKENS = 512
_STEPS = 300
_EVALUATE = 25
_PATIENCE = 3
_LEARNING_RATE = 1e-3
_SHORTLIST = 512
# L2 penalties of logistic regressions, for features of unit variance.
_LOGISTIC_PENALTIES = (1.0, 10.0, 100.0)
# Head columns that a step compares: all of a vocabulary of at most so many
# pieces; of a larger one the likeliest, and so many others that are drawn anew
# every step.
_MOST_COLUMNS = 2048
_DRAWN_COLUMNS = 512
_TOP = 8


@dataclasses.dataclass(frozen=True)
class LearnedExits:
  """A report of exits that were learned beside frozen weights."""

  layers: tuple[int, ...]  # 1-based
  # Share of held-out tokens of the full model's texts whose argmax after each
  # layer is the full model's, without the translator and with it.
  agreement_before: tuple[float, ...]
  agreement_after: tuple[float, ...]
  num_tokens: int  # tokens of the model's own texts that were read
  seconds: float  # of learning, without decoding these texts
  base_digest: str  # of the model's own parameters

  def __str__(self) -> str:
    each = zip(
      self.layers, self.agreement_before, self.agreement_after, strict=True
    )
    gains = ", ".join(
      f"layer {layer} {old:.2f} -> {new:.2f}" for layer, old, new in each
    )
    return (
      f"Exits learned in {self.seconds:.0f} s from {self.num_tokens} tokens; "
      "share of tokens"
      f" that agree with the full model: {gains}. The model's weights are "
      "unchanged (digest"
      f" {self.base_digest[:12]})."
    )


def shortlist(
  tokens: Sequence[Sequence[int]], vocab_size: int
) -> tuple[int, ...]:
  """The tokens that texts have most often, EOS included; at least two of the
  vocabulary.
  """
  counts = np.bincount(
    np.concatenate([*tokens, [0]]).astype(int), minlength=vocab_size
  )
  counts[0] = 0  # padding
  ranked = np.argsort(-counts, kind="stable")
  return tuple(
    int(token)
    for token in ranked[: min(_SHORTLIST, max(2, (counts > 0).sum()))]
  )


def fit(
  predictor: inference.Predictor,
  texts: Sequence[str],
  tokens: Sequence[Sequence[int]],
  layers: Sequence[int],
  *,
  rank: int,
  seed: int = 0,
  progress: Report,
) -> tuple[dict[str, np.ndarray], LearnedExits]:
  """Fits translators, learned propagation of some `rank`, classifier and probes
  at 1-based exit `layers`; nothing of the model changes. Probes read the
  shortlist of its options; without one there are none.

  `tokens` [num_texts] are what the full model writes for `texts`, EOS included.
  Returns leaves of the parameter tree by path, float32, and the report;
  ValueError where states are not finite.
  """
  start = time.monotonic()
  config, layers = predictor.config, tuple(layers)

  def report_text(done: int, of: int) -> None:
    progress(0.3 * done / of, f"states of text {done} of {of}")

  sums, sample = _read_all(predictor, layers, texts, tokens, seed, report_text)
  penalty, starts = _ridge(sums, sample)
  head = parameters.head_kernel(predictor.params, config)
  head = np.asarray(head[:, : predictor.vocabulary.vocab_size])
  report = part(progress, 0.3, 0.9)
  translators = _train_translators(sample, head, starts, seed, report)
  progress(0.9, "classifier and probes")
  flat, agreement = _confidence_heads(
    predictor, sample, layers, translators, head
  )
  for layer, translator, each in zip(layers, translators, sums, strict=True):
    here = f"layers_{layer - 1}"
    names = [f"exit_translators/{here}/{name}" for name in ("kernel", "bias")]
    down_up = ("down/kernel", "down/bias", "up/kernel")
    names += [f"exit_propagation/{here}/{name}" for name in down_up]
    leaves = (
      *translator,
      *_low_rank(each, penalty, rank, config.num_decoder_layers - layer),
    )
    flat |= zip(names, leaves, strict=True)
  before, after = zip(*agreement, strict=True)
  count = sum(map(len, tokens))
  seconds = time.monotonic() - start
  base_digest = parameters.base_digest(predictor.params)
  learned = LearnedExits(layers, before, after, count, seconds, base_digest)
  made = {
    f"decoder/{path}": np.asarray(leaf, np.float32)
    for path, leaf in flat.items()
  }
  return made, learned


# ---- The full model reading its own texts


def full_states(config: network.T5Config, params, inputs, targets) -> Any:
  """States of a teacher-forced pass, [layers, batch, length, emb] each: d^i,
  decoder_norm(d^i), and what the head reads of d^i, which the translator has
  changed.
  """
  module = network.Transformer(config)
  shifted = jnp.concatenate(
    [jnp.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1
  )
  return module.apply(
    {"params": params}, inputs, shifted, targets, method="states"
  )


def with_targets(
  batches: Sequence[prompt_batches.PromptBatch], tokens: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
  """(rows, inputs, targets) of every batch; targets are the `tokens` of all
  prompts, of one length: one program is compiled.
  """
  length = -(-max(1, *map(len, tokens)) // _BUCKET) * _BUCKET
  for batch in batches:
    rows = batch.rows.tolist()
    targets = np.zeros((len(batch.tokens), length), np.int32)
    for i, row in enumerate(rows):
      targets[i, : len(tokens[row])] = tokens[row]
    yield rows, batch.tokens, targets


class _Sums(NamedTuple):
  """Normal equations of one exit layer j with X = [x; 1] of every token, and
  the skipped layers k = j + 2 ... L.
  """

  gram: Any  # X^T X
  last: Any  # X^T x of the last layer
  inputs: Any  # X^T (d^{k-1} - d^j) [emb + 1, skipped, emb]
  squares: Any  # sums of squares of d^{k-1} [skipped]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
  """States of some tokens."""

  exits: np.ndarray  # x at every exit layer [layers, tokens, emb]
  last: np.ndarray  # x at the last layer
  # Features of `evidence` that need no head [layers, tokens, 2]: cosine with
  # the layer before, log of the root mean square.
  scalars: np.ndarray
  trains: np.ndarray  # tokens that maps are fitted to
  held_out: np.ndarray  # the others; the same where there is one text only


def _read_all(
  predictor, layers, texts, tokens, seed, progress
) -> tuple[list[_Sums], _Sample]:
  """Normal equations of every exit layer over all tokens, and a sample of
  states.
  """
  config = dataclasses.replace(
    predictor.config, dtype="float32", one_hot_embedding=False
  )
  order = np.random.default_rng(seed).permutation(len(texts))
  lengths = np.array([len(row) for row in tokens])
  room = max(1, _SAMPLE_BYTES // (4 * config.emb_dim * (len(layers) + 1)))
  chosen = order[np.cumsum(lengths[order]) <= room]
  kept = np.zeros(len(texts), bool)
  held_out = np.zeros(len(texts), bool)
  kept[chosen if len(chosen) else order[:1]] = True
  held_out[chosen[: max(1, round(_HELD_OUT * len(chosen)))]] = len(chosen) > 1
  read = jax.jit(functools.partial(_read_batch, config, layers))
  sums = None
  found = []
  done = 0
  batches = predictor.with_options(batch_size=BATCH).plan(list(texts))
  for rows, inputs, targets in with_targets(batches, tokens):
    weights = np.zeros(targets.shape, np.float32)
    weights[: len(rows)] = (targets[: len(rows)] > 0) & ~held_out[rows, None]
    made, *states = read(predictor.params, inputs, targets, weights)
    made = jax.tree.map(lambda x: np.asarray(x, np.float64), made)
    sums = made if sums is None else jax.tree.map(np.add, sums, made)
    for i, row in enumerate(rows):
      if kept[row]:
        columns = [np.asarray(array[:, i, : lengths[row]]) for array in states]
        found.append((*columns, np.full(lengths[row], held_out[row])))
    done += len(rows)
    progress(done, len(texts))
  exits, last, scalars, out = zip(*found, strict=True)
  exits, last, scalars = (
    np.concatenate(part, axis=1) for part in (exits, last, scalars)
  )
  trains, out = (
    np.flatnonzero(mask) for mask in (~np.concatenate(out), np.concatenate(out))
  )
  sample = _Sample(exits, last[0], scalars, trains, out if len(out) else trains)
  if not (np.isfinite(sample.last).all() and np.isfinite(sample.exits).all()):
    raise ValueError(
      "Expected a model with finite states, got NaN or infinity on its own "
      "texts; the"
      " checkpoint is damaged, or its numbers are too large for float32."
    )
  return sums or [], sample


def _read_batch(
  config: network.T5Config, layers, params, inputs, targets, weights
):
  """Normal equations of a batch, x at the exits, x at the end,
  `_Sample.scalars`.
  """
  hidden, normed, _ = full_states(config, params, inputs, targets)
  weight = weights.reshape(-1, 1)

  def flat(x):
    return x.reshape(-1, config.emb_dim) * weight

  sums = []
  scalars = []
  for layer in layers:
    raw = hidden[layer - 1]
    before = hidden[layer - 2] if layer > 1 else jnp.zeros_like(raw)
    square = jnp.maximum(jnp.mean(jnp.square(raw), axis=-1), 1e-30)
    similar = confidence.cosine_similarity(raw, before)
    scalars.append(jnp.stack([similar, 0.5 * jnp.log(square)], axis=-1))
    x = jnp.concatenate([flat(normed[layer - 1]), weight], axis=1)
    later = hidden[layer:-1].reshape(-1, targets.size, config.emb_dim)
    moved = (later - raw.reshape(1, targets.size, config.emb_dim)) * weight[
      None
    ]
    skipped = jnp.einsum("te,ktf->ekf", x, moved)
    squares = jnp.sum(jnp.square(later * weight[None]), axis=(1, 2))
    sums.append(_Sums(x.T @ x, x.T @ flat(normed[-1]), skipped, squares))
  return sums, normed[jnp.asarray(layers) - 1], normed[-1:], jnp.stack(scalars)


# ---- Ridge and reduced-rank regression


def _ridge(sums: Sequence[_Sums], sample: _Sample) -> tuple[float, _Maps]:
  """The penalty that predicts held-out x of the last layer best, and the maps
  under it; with fewer tokens than emb_dim + 1 the equations have no unique
  solution without one.
  """
  held = sample.held_out
  found = []
  for penalty in _PENALTIES:
    maps = []
    error = 0.0
    for each, states in zip(sums, sample.exits, strict=True):
      solved = _solve(each.gram, each.last, penalty)
      predicted = states[held] @ solved[:-1] + solved[-1]
      error += float(np.square(predicted - sample.last[held]).mean())
      maps.append((solved[:-1] - np.eye(len(solved) - 1), solved[-1]))
    found.append((error, penalty, maps))
  return min(found, key=lambda entry: entry[0])[1:]


def _solve(gram: np.ndarray, right: np.ndarray, penalty: float) -> np.ndarray:
  """(X^T X + penalty * mean diagonal)^-1 X^T Y; the bias is not penalised."""
  ridge = np.full(
    len(gram), penalty * np.trace(gram[:-1, :-1]) / (len(gram) - 1)
  )
  ridge[-1] = 1e-12
  return np.linalg.solve(gram + np.diag(ridge), right)


def _low_rank(sums: _Sums, penalty: float, rank: int, skipped: int):
  """Reduced-rank regression (Izenman 1975) of the skipped layers' inputs minus
  d^j.

  Inputs of different layers are weighted by 1 / their root mean square: each
  layer norms them.
  """
  emb_dim = sums.gram.shape[0] - 1
  down = np.zeros((emb_dim + 1, rank))
  up = np.zeros((skipped, rank, emb_dim))
  if skipped > 1:  # the next layer's input is d^j itself
    count = max(sums.gram[-1, -1], 1.0)
    scale = np.sqrt(np.maximum(sums.squares / (count * emb_dim), 1e-30))[
      None, :, None
    ]
    solved = _solve(
      sums.gram, (sums.inputs / scale).reshape(emb_dim + 1, -1), penalty
    )
    _, vectors = np.linalg.eigh(solved.T @ sums.gram @ solved)
    vectors = vectors[:, ::-1][:, :rank]
    back = vectors.T.reshape(-1, skipped - 1, emb_dim) * scale
    down[:, : vectors.shape[1]] = solved @ vectors
    up[1:, : len(back)] = back.transpose(1, 0, 2)
  down, up = down.astype(np.float32), up.astype(np.float32)
  return down[:-1], down[-1], up


# ---- Translators by cross entropy


def _train_translators(sample: _Sample, head, starts: _Maps, seed, progress):
  """(A_j, b_j) of every exit layer, at the evaluation with the least held-out
  loss.
  """
  maps: Any = tuple(
    jnp.asarray(np.stack(part), jnp.float32)
    for part in zip(*starts, strict=True)
  )
  optimizer = optax.adam(
    optax.cosine_decay_schedule(_LEARNING_RATE, _STEPS, 0.05)
  )
  state = optimizer.init(maps)
  rng = np.random.default_rng(seed)
  columns = _columns(sample, head)
  rows_of_head = jnp.asarray(head.T)  # gathered faster than columns
  loss = functools.partial(cross_entropy, columns=jnp.asarray(columns))

  @jax.jit
  def steps(maps, state, exits, final, drawn, head):
    def one(carry, batch):
      maps, state = carry
      updates, state = optimizer.update(
        jax.grad(loss)(maps, *batch, head), state
      )
      return (optax.apply_updates(maps, updates), state), None

    return jax.lax.scan(one, (maps, state), (exits, final, drawn))[0]

  held = sample.held_out[: 4 * _STEP_TOKENS]
  shown = (
    sample.exits[:, held],
    sample.last[held],
    _drawn(rng, columns, head, 1)[0],
  )
  evaluate = jax.jit(loss)
  best = maps
  least = float(evaluate(maps, *shown, rows_of_head))
  worse = 0
  size = min(_STEP_TOKENS, len(sample.trains))
  for step in range(_EVALUATE, _STEPS + 1, _EVALUATE):
    rows = np.stack(
      [rng.choice(sample.trains, size, replace=False) for _ in range(_EVALUATE)]
    )
    batches = sample.exits[:, rows].transpose(1, 0, 2, 3), sample.last[rows]
    drawn = _drawn(rng, columns, head, _EVALUATE)
    maps, state = steps(maps, state, *batches, drawn, rows_of_head)
    found = float(evaluate(maps, *shown, rows_of_head))
    progress(
      step / _STEPS, f"translators, step {step} of {_STEPS}, loss {found:.3f}"
    )
    best, least, worse = (
      (maps, found, 0) if found < least else (best, least, worse + 1)
    )
    if worse == _PATIENCE:
      break
  return list(zip(*map(np.asarray, best), strict=True))


def cross_entropy(maps, exits, last, drawn, head, *, columns):
  """Mean over tokens and layers of -sum_v p_v log q_v, in nats; all pieces but
  `columns` are represented by `drawn` ones, each of which stands for an equal
  share.
  """
  kernels, biases = maps
  pieces = jnp.concatenate([columns, drawn])
  others = head.shape[0] - columns.shape[0]
  stands_for = np.zeros(pieces.shape[0], np.float32)
  if drawn.shape[0]:
    stands_for[columns.shape[0] :] = np.log(others / drawn.shape[0])

  def read(x):
    return jax.nn.log_softmax(x @ head[pieces].T + stands_for[None], axis=-1)

  target = jnp.exp(read(last))
  total = 0.0
  for number in range(exits.shape[0]):
    x = exits[number] + exits[number] @ kernels[number] + biases[number][None]
    total -= jnp.mean(jnp.sum(target * read(x), axis=-1))
  return total / exits.shape[0]


def _columns(sample: _Sample, head: np.ndarray) -> np.ndarray:
  """Pieces that every step compares."""
  count = head.shape[1]
  if count <= _MOST_COLUMNS:
    return np.arange(count)
  seen = np.zeros(count)
  for states in np.split(sample.last, range(1024, len(sample.last), 1024)):
    logits = states @ head
    np.add.at(seen, np.argpartition(-logits, _TOP, axis=1)[:, :_TOP].ravel(), 1)
  return np.sort(np.argsort(-seen, kind="stable")[: _MOST_COLUMNS // 2])


def _drawn(
  rng, columns: np.ndarray, head: np.ndarray, num_steps: int
) -> np.ndarray:
  """Other pieces that a step compares, [num_steps, pieces]."""
  others = np.setdiff1d(np.arange(head.shape[1]), columns)
  size = min(_DRAWN_COLUMNS, len(others))
  return np.stack(
    [rng.choice(others, size, replace=False) for _ in range(num_steps)]
  )


# ---- Classifier and probes on held-out tokens


def _confidence_heads(predictor, sample: _Sample, layers, maps: _Maps, head):
  """Leaves of the classifier and, with a shortlist, of the probes; shares of
  tokens that agree with the full model, (without the translator, with it) a
  layer.
  """
  held = sample.held_out
  emb_dim = sample.last.shape[1]
  listed = predictor.options.shortlist
  best = np.argmax(sample.last[held] @ head, axis=1)
  read = []
  agrees = []
  agreement = []
  probes = np.zeros(
    (emb_dim + confidence.NUM_FEATURES + 1, predictor.num_layers - 1)
  )
  for number, (layer, (kernel, bias)) in enumerate(
    zip(layers, maps, strict=True)
  ):
    x = sample.exits[number, held]
    read.append(x + x @ kernel + bias)
    agrees.append(np.argmax(read[-1] @ head, axis=1) == best)
    before = float((np.argmax(x @ head, axis=1) == best).mean())
    agreement.append((before, float(agrees[-1].mean())))
    if listed is not None:
      peaks = layers_lib.peaks(jnp.asarray(read[-1] @ head[:, list(listed)]))
      of_head = np.stack(confidence.logit_features(peaks), axis=-1)
      features = [read[-1], of_head, sample.scalars[number, held]]
      fitted = _logistic(np.concatenate(features, axis=-1), agrees[-1])
      probes[:-1, layer - 1], probes[-1, layer - 1] = fitted
  weights, offset = _logistic(np.concatenate(read), np.concatenate(agrees))
  flat: dict[str, Any] = {"exit_classifier/kernel": weights[:, None]}
  flat["exit_classifier/bias"] = [offset]
  if listed is not None:
    parts = probes[:emb_dim], probes[emb_dim:-1], probes[-1]
    names = ("exit_probes/kernel", "exit_probes/features", "exit_probes/bias")
    flat |= dict(zip(names, parts, strict=True))
  return flat, agreement


def _logistic(
  features: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, float]:
  """Weights and bias of a logistic regression; of the penalties the one that
  predicts every second token best from the others.
  """
  mean = features.mean(axis=0)
  spread = features.std(axis=0) + 1e-6
  unit = np.concatenate(
    [(features - mean) / spread, np.ones((len(features), 1))], axis=1
  )
  signs = np.where(labels, 1.0, -1.0)

  def minimum(rows, signs, penalty):
    ridge = np.full(rows.shape[1], penalty)
    ridge[-1] = 1e-3

    def loss(w):
      margin = signs * (rows @ w)
      slope = -signs / (1.0 + np.exp(np.clip(margin, -30.0, 30.0)))
      value = np.logaddexp(0.0, -margin).sum() + 0.5 * (ridge * w * w).sum()
      return value, rows.T @ slope + ridge * w

    return optimize.minimize(
      loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B"
    ).x

  def missed(penalty):
    weights = minimum(unit[::2], signs[::2], penalty / 2)
    return np.logaddexp(0.0, -signs[1::2] * (unit[1::2] @ weights)).sum()

  weights = minimum(unit, signs, min(_LOGISTIC_PENALTIES, key=missed))
  return weights[:-1] / spread, float(
    weights[-1] - mean @ (weights[:-1] / spread)
  )
