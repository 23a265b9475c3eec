"""Exits learned beside frozen weights: translators and learned propagation.

The full model reads its own texts once. From the states d^i of every decoder layer, with x =
decoder_norm(d^j) at exit layer j, two linear maps are fitted; no parameter changes:

- the *translator* of layer j (tuned lens, Belrose et al. 2023): head(x + x A_j + b_j) predicts
  the full model's probabilities. A_j starts at the ridge regression of the last layer's x and
  is then trained by cross entropy;
- *learned propagation* from layer j to a skipped layer k: its input d^{k-1} is predicted as
  d^j + [x; 1] D_j U_jk, by reduced-rank regression: the `rank` columns of D_j serve all k.

On texts that no map was fitted to, the exit classifier and a probe a layer learn by logistic
regression whether the layer's token is the full model's, from states as translators leave them.

Memory is bounded whatever the model and the rows: normal equations of size emb_dim + 1 a
layer, and a sample of at most `_SAMPLE_BYTES` of states.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import inference
from calm.exits import confidence, evidence
from calm.fitting.result import LearnedExits
from calm.t5 import network, parameters

Progress = Callable[[float, str], None]

# Texts that the full model reads at a time, and the multiple that their length is padded to.
_BATCH, _BUCKET = 16, 8
_SAMPLE_BYTES = 2**29
# Of the sample's texts, the share that no map is fitted to: they choose penalty and last step,
# and classifier and probes learn from them, since maps agree with their own tokens too often.
_HELD_OUT = 0.25
_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Tokens of a training step; steps; steps between two looks at the held-out texts.
_STEP_TOKENS, _STEPS, _LOOK = 512, 300, 25
_LEARNING_RATE = 1e-3
# Looks without a better one after which training ends.
_PATIENCE = 3
# Tokens of a shortlist; penalties of logistic regressions, for features of unit variance.
_SHORTLIST = 512
_LOGISTIC_PENALTIES = (1.0, 10.0, 100.0)
# Head columns that a step compares: all of a vocabulary of at most so many pieces; of a larger
# one the likeliest, and so many others that are drawn anew every step.
_MOST_COLUMNS, _DRAWN_COLUMNS, _TOP = 2048, 512, 8


@dataclasses.dataclass(frozen=True, eq=False)
class ExitMaps:
  """Fitted maps, by 1-based exit layer.

  Attributes:
    translators: layer j -> (A_j [emb_dim, emb_dim], b_j [emb_dim]).
    propagation: layer j -> (D_j [emb_dim, rank], its bias [rank], U_j [layers - j, rank,
      emb_dim]); U_j[k - j - 1] is for skipped layer k.
    classifier: (kernel [emb_dim, 1], bias [1]) of the exit classifier, for all layers.
    probes: (kernel [emb_dim, L - 1], features [NUM_FEATURES, L - 1], bias [L - 1]) of
      `evidence.Probes`, zeros of layers without exits; None without a shortlist.
    agreement: layer j -> the share of held-out tokens whose argmax is the full model's:
      (head on x as it is, through the translator).
    num_tokens: tokens that were read.
    num_sampled: those of them that trained the translators.
    penalty: of the ridge regression, over the mean squared entry of x.
    seconds: of fitting, without decoding the model's texts.
  """

  translators: Mapping[int, tuple[np.ndarray, np.ndarray]]
  propagation: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
  classifier: tuple[np.ndarray, np.ndarray]
  probes: tuple[np.ndarray, np.ndarray, np.ndarray] | None
  agreement: Mapping[int, tuple[float, float]]
  num_tokens: int
  num_sampled: int
  penalty: float
  seconds: float

  def summary(self, rank: int, base_digest: str) -> LearnedExits:
    """What a page says of them."""
    before, after = zip(*self.agreement.values(), strict=True)
    return LearnedExits(
      layers=tuple(self.translators),
      agreement_before=before,
      agreement_after=after,
      rank=rank,
      num_tokens=self.num_tokens,
      penalty=self.penalty,
      seconds=self.seconds,
      base_digest=base_digest,
    )

  def parameters(self) -> dict[str, np.ndarray]:
    """As paths and leaves of the decoder's parameter tree."""
    flat = {}
    for layer, (kernel, bias) in self.translators.items():
      path = f"decoder/exit_translators/layers_{layer - 1}"
      flat |= {f"{path}/kernel": kernel, f"{path}/bias": bias}
    for layer, (kernel, bias, up) in self.propagation.items():
      path = f"decoder/exit_propagation/layers_{layer - 1}"
      flat |= {f"{path}/down/kernel": kernel, f"{path}/down/bias": bias}
      flat[f"{path}/up/kernel"] = up
    names = ("kernel", "features", "bias")
    for name, leaf in zip(names, self.probes or (), strict=False):
      flat[f"decoder/exit_probes/{name}"] = leaf
    for name, leaf in zip(("kernel", "bias"), self.classifier, strict=True):
      flat[f"decoder/exit_classifier/{name}"] = leaf
    return {path: np.asarray(leaf, np.float32) for path, leaf in flat.items()}


def shortlist(tokens: Sequence[Sequence[int]], vocab_size: int) -> tuple[int, ...]:
  """The tokens that the full model writes most often, EOS included; at least two.

  Args:
    tokens: its texts.
    vocab_size: pieces of the vocabulary; others take part where texts have fewer than two.
  """
  counts = np.bincount(np.concatenate([*tokens, [0]]).astype(int), minlength=vocab_size)
  counts[0] = 0  # padding
  order = np.argsort(-counts, kind="stable")
  return tuple(int(token) for token in order[: min(_SHORTLIST, max(2, (counts > 0).sum()))])


def fit(
  predictor: inference.Predictor,
  texts: Sequence[str],
  tokens: Sequence[Sequence[int]],
  layers: Sequence[int],
  *,
  rank: int,
  listed: Sequence[int] | None = None,
  seed: int = 0,
  progress: Progress,
) -> ExitMaps:
  """Fits translators and learned propagation of some layers.

  Args:
    predictor: the model, under its prefix and limits; nothing of it changes.
    texts: [num_texts] prompts.
    tokens: [num_texts] what the full model writes for them, EOS included.
    layers: 1-based exit layers, below the last.
    rank: columns of D_j.
    listed: tokens of the shortlist that probes read; None: no probes.
    seed: of the sample, the held-out texts and the training steps.
    progress: told of the share done in [0, 1].

  Raises:
    ValueError: no token to learn from, or states that are not finite.
  """
  start = time.monotonic()
  reader = _Reader(predictor, tuple(layers))
  sums, sample = reader.read(
    texts,
    tokens,
    seed,
    lambda done, of: progress(0.3 * done / of, f"states of text {done} of {of}"),
  )
  penalty, starts = _ridge(sums, sample)
  config, num_pieces = predictor.config, predictor.vocabulary.vocab_size
  heads = parameters.head_kernels(predictor.params, config)
  heads = [np.asarray(head[:, :num_pieces]) for head in heads]
  by_layer = [heads[layer - 1] if config.per_layer_heads else heads[0] for layer in layers]
  trained = _Translators(sample, by_layer, heads[-1], seed).train(
    starts, lambda share, text: progress(0.3 + 0.6 * share, text)
  )
  progress(0.9, "classifier and probes")
  judged = _Judged.of(sample, trained, by_layer, heads[-1], listed)
  return ExitMaps(
    translators=dict(zip(layers, trained, strict=True)),
    propagation={
      layer: _low_rank(sums[layer], penalty, rank, config.num_decoder_layers - layer)
      for layer in layers
    },
    classifier=judged.classifier(),
    probes=judged.probes(layers, config.num_decoder_layers),
    agreement=dict(zip(layers, judged.agreement, strict=True)),
    num_tokens=sum(map(len, tokens)),
    num_sampled=len(sample.trains),
    penalty=penalty,
    seconds=time.monotonic() - start,
  )


@dataclasses.dataclass
class _Sums:
  """Normal equations of one exit layer, with X = [x; 1] of every token.

  Attributes:
    gram: X^T X, [emb + 1, emb + 1].
    last: X^T x of the last layer, [emb + 1, emb].
    inputs: X^T (d^{k-1} - d^j) for k = j + 2 ... L, [emb + 1, layers - j - 1, emb].
    squares: sum of squares of d^{k-1}, [layers - j - 1].
  """

  gram: Any
  last: Any
  inputs: Any
  squares: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
  """States of some tokens.

  Attributes:
    exits: x at every exit layer, [layers, tokens, emb].
    last: x at the last layer, [tokens, emb].
    scalars: of `evidence`, what needs no head: cosine with the layer before and log of the root
      mean square, [layers, tokens, 2].
    trains: tokens that maps are fitted to; `held_out`: the others.
  """

  exits: np.ndarray
  last: np.ndarray
  scalars: np.ndarray
  trains: np.ndarray
  held_out: np.ndarray

  @property
  def looked_at(self) -> np.ndarray:
    """Tokens that choose; those that train where there is but one text."""
    return self.held_out if len(self.held_out) else self.trains


@dataclasses.dataclass(frozen=True)
class _Reader:
  """The full model reading its own texts."""

  predictor: inference.Predictor
  layers: tuple[int, ...]

  def read(self, texts, tokens, seed: int, progress) -> tuple[dict[int, _Sums], _Sample]:
    config = self.predictor.config
    order = np.random.default_rng(seed).permutation(len(texts))
    lengths = np.array([len(row) for row in tokens])
    room = max(1, _SAMPLE_BYTES // (4 * config.emb_dim * (len(self.layers) + 1)))
    kept = np.zeros(len(texts), bool)
    kept[order] = np.cumsum(lengths[order]) <= room
    kept[order[0]] = True
    held_out = np.zeros(len(texts), bool)
    chosen = order[kept[order]]
    held_out[chosen[: max(1, round(_HELD_OUT * len(chosen)))]] = len(chosen) > 1
    sums: Any = None
    found = []
    done = 0
    one = self.predictor.with_options(batch_size=_BATCH)
    longest = -(-max(1, int(lengths.max(initial=1))) // _BUCKET) * _BUCKET
    read = jax.jit(functools.partial(_read, self._float32(), self.layers))
    for batch in one.plan(list(texts)):
      rows = [int(row) for row in batch.rows]
      targets = np.zeros((len(batch.tokens), longest), np.int32)
      for i, row in enumerate(rows):
        targets[i, : len(tokens[row])] = tokens[row]
      weights = np.zeros(targets.shape, np.float32)
      weights[: len(rows)] = (targets[: len(rows)] > 0) & ~held_out[rows, None]
      made, exits, last, scalars = read(self.predictor.params, batch.tokens, targets, weights)
      made = jax.tree.map(lambda x: np.asarray(x, np.float64), made)
      sums = made if sums is None else jax.tree.map(np.add, sums, made)
      for i, row in enumerate(rows):
        if kept[row]:
          count = len(tokens[row])
          found.append(
            (
              np.asarray(exits[:, i, :count]),
              np.asarray(last[i, :count]),
              np.asarray(scalars[:, i, :count]),
              np.full(count, held_out[row]),
            )
          )
      done += len(rows)
      progress(done, len(texts))
    exits, last, scalars, out = zip(*found, strict=True)
    sample = _Sample(
      np.concatenate(exits, axis=1),
      np.concatenate(last),
      np.concatenate(scalars, axis=1),
      np.flatnonzero(~np.concatenate(out)),
      np.flatnonzero(np.concatenate(out)),
    )
    if not (np.isfinite(sample.last).all() and np.isfinite(sample.exits).all()):
      raise ValueError(
        "Expected a model with finite states, got NaN or infinity on its own texts; the"
        " checkpoint is damaged, or its numbers are too large for float32."
      )
    return {
      layer: _Sums(**entry) for layer, entry in zip(self.layers, sums, strict=True)
    }, sample

  def _float32(self) -> network.T5Config:
    return dataclasses.replace(self.predictor.config, dtype="float32", one_hot_embedding=False)


def _read(config: network.T5Config, layers, params, inputs, targets, weights):
  """One batch: normal equations; x at the exits, [layers, batch, length, emb], and at the end;
  `_Sample.scalars`."""
  shifted = jnp.concatenate([jnp.zeros_like(targets[:, :1]), targets[:, :-1]], axis=1)
  module = network.Transformer(config)
  states: Any = module.apply({"params": params}, inputs, shifted, targets, method=_states)
  hidden, normed = states
  weight = weights.reshape(-1, 1)
  flat = lambda x: x.reshape(-1, config.emb_dim) * weight
  sums, scalars = [], []
  for layer in layers:
    raw = hidden[layer - 1]
    before = hidden[layer - 2] if layer > 1 else jnp.zeros_like(raw)
    square = jnp.maximum(jnp.mean(jnp.square(raw), axis=-1), 1e-30)
    similar = confidence.cosine_similarity(raw, before)
    scalars.append(jnp.stack([similar, 0.5 * jnp.log(square)], axis=-1))
    x = jnp.concatenate([flat(normed[layer - 1]), weight], axis=1)
    later = hidden[layer:-1].reshape(-1, targets.size, config.emb_dim)
    moved = (later - hidden[layer - 1].reshape(1, targets.size, config.emb_dim)) * weight[None]
    sums.append(
      {
        "gram": x.T @ x,
        "last": x.T @ flat(normed[-1]),
        "inputs": jnp.einsum("te,ktf->ekf", x, moved),
        "squares": jnp.sum(jnp.square(later * weight[None]), axis=(1, 2)),
      }
    )
  return sums, normed[jnp.asarray(layers) - 1], normed[-1], jnp.stack(scalars)


def _states(module: network.Transformer, inputs, shifted, targets):
  """Raw and normed residuals of every layer, [layers, batch, length, emb]."""
  hidden = module.hidden_states(inputs, shifted, targets)
  return hidden, module.decoder.normed(hidden)


def _ridge(sums: Mapping[int, _Sums], sample: _Sample):
  """The penalty that predicts held-out x of the last layer best, and the maps under it.

  With fewer tokens than emb_dim + 1 the equations have no single solution without one.
  """
  best, least = None, np.inf
  held = sample.looked_at
  for penalty in _PENALTIES:
    maps, error = [], 0.0
    for number, each in enumerate(sums.values()):
      solved = _solve(each.gram, each.last, penalty)
      x = sample.exits[number, held]
      error += float(np.square(x @ solved[:-1] + solved[-1] - sample.last[held]).mean())
      maps.append((solved[:-1] - np.eye(len(solved) - 1), solved[-1]))
    if error < least:
      best, least = (penalty, maps), error
  assert best is not None
  return best


def _solve(gram: np.ndarray, right: np.ndarray, penalty: float) -> np.ndarray:
  """(X^T X + penalty * mean diagonal)^-1 X^T Y; the bias is not penalised."""
  scale = penalty * np.trace(gram[:-1, :-1]) / (len(gram) - 1)
  ridge = np.full(len(gram), scale)
  ridge[-1] = 1e-12
  return np.linalg.solve(gram + np.diag(ridge), right)


def _low_rank(sums: _Sums, penalty: float, rank: int, skipped: int):
  """Reduced-rank regression (Izenman 1975) of what the skipped layers' inputs add to d^j.

  Inputs of different layers are weighted by 1 / their root mean square: each layer norms them.
  """
  emb_dim = sums.gram.shape[0] - 1
  up = np.zeros((skipped, rank, emb_dim))
  if skipped < 2:  # the next layer's input is d^j itself
    return (
      np.zeros((emb_dim, rank), np.float32),
      np.zeros(rank, np.float32),
      up.astype(np.float32),
    )
  count = max(sums.gram[-1, -1], 1.0)
  scale = np.sqrt(np.maximum(sums.squares / (count * emb_dim), 1e-30))
  right = (sums.inputs / scale[None, :, None]).reshape(emb_dim + 1, -1)
  solved = _solve(sums.gram, right, penalty)
  _, vectors = np.linalg.eigh(solved.T @ sums.gram @ solved)
  vectors = vectors[:, ::-1][:, :rank]
  down = solved @ vectors
  made = vectors.T.reshape(-1, skipped - 1, emb_dim) * scale[None, :, None]
  up[1:, : made.shape[0]] = made.transpose(1, 0, 2)
  whole = np.zeros((emb_dim + 1, rank))
  whole[:, : down.shape[1]] = down
  return whole[:-1].astype(np.float32), whole[-1].astype(np.float32), up.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Translators:
  """Cross entropy of all layers' translators to the full model's probabilities.

  Attributes:
    sample: states.
    heads: of every exit layer, [emb, pieces].
    last_head: of the last layer.
    seed: of the steps.
  """

  sample: _Sample
  heads: Sequence[np.ndarray]
  last_head: np.ndarray
  seed: int

  def train(self, starts, progress: Progress) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A_j, b_j) of every exit layer."""
    import optax

    kernels = jnp.asarray(np.stack([kernel for kernel, _ in starts]), jnp.float32)
    biases = jnp.asarray(np.stack([bias for _, bias in starts]), jnp.float32)
    maps = kernels, biases
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _STEPS, 0.05))
    state = optimizer.init(maps)
    rng = np.random.default_rng(self.seed)
    columns = self._columns()
    distinct = {id(head): head for head in (*self.heads, self.last_head)}
    # Rows of a transposed head are gathered faster than columns.
    heads = {key: jnp.asarray(head.T) for key, head in distinct.items()}
    by_layer, last_head = [heads[id(head)] for head in self.heads], heads[id(self.last_head)]
    loss = functools.partial(_loss, columns=jnp.asarray(columns))

    @jax.jit
    def steps(maps, state, exits, last, drawn, by_layer, last_head):
      def one(carry, batch):
        maps, state = carry
        grads = jax.grad(loss)(maps, *batch, by_layer, last_head)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(maps, updates), state), None

      return jax.lax.scan(one, (maps, state), (exits, last, drawn))[0]

    held = self.sample.looked_at[: 4 * _STEP_TOKENS]
    shown = self.sample.exits[:, held], self.sample.last[held], self._drawn(rng, columns, 1)[0]
    look = jax.jit(loss)
    best, least, worse = maps, float(look(maps, *shown, by_layer, last_head)), 0
    trains, size = self.sample.trains, min(_STEP_TOKENS, len(self.sample.trains))
    for step in range(_LOOK, _STEPS + 1, _LOOK):
      rows = np.stack([rng.choice(trains, size, replace=False) for _ in range(_LOOK)])
      exits = self.sample.exits[:, rows].transpose(1, 0, 2, 3)
      drawn = self._drawn(rng, columns, _LOOK)
      batches = exits, self.sample.last[rows], drawn
      maps, state = steps(maps, state, *batches, by_layer, last_head)
      found = float(look(maps, *shown, by_layer, last_head))
      progress(step / _STEPS, f"translators, step {step} of {_STEPS}, loss {found:.3f}")
      best, least, worse = (maps, found, 0) if found < least else (best, least, worse + 1)
      if worse == _PATIENCE:
        break
    return list(zip(*map(np.asarray, best), strict=True))

  def _columns(self) -> np.ndarray:
    """Pieces that every step compares."""
    count = self.last_head.shape[1]
    if count <= _MOST_COLUMNS:
      return np.arange(count)
    seen = np.zeros(count)
    for start in range(0, len(self.sample.last), 1024):
      logits = self.sample.last[start : start + 1024] @ self.last_head
      np.add.at(seen, np.argpartition(-logits, _TOP, axis=1)[:, :_TOP].ravel(), 1)
    return np.sort(np.argsort(-seen, kind="stable")[: _MOST_COLUMNS // 2])

  def _drawn(self, rng, columns: np.ndarray, num_steps: int) -> np.ndarray:
    """Other pieces that a step compares, [num_steps, pieces]."""
    others = np.setdiff1d(np.arange(self.last_head.shape[1]), columns)
    size = min(_DRAWN_COLUMNS, len(others))
    return np.stack([rng.choice(others, size, replace=False) for _ in range(num_steps)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Judged:
  """Held-out tokens at every exit layer, with whether the layer's argmax is the full model's.

  Attributes:
    read: x through the translators, [layers, tokens, emb].
    agrees: [layers, tokens].
    agreement: shares of tokens that agree without and with the translator, one pair a layer.
    known: `evidence` of each token, [layers, tokens, NUM_FEATURES]; None without a shortlist.
  """

  read: np.ndarray
  agrees: np.ndarray
  agreement: tuple[tuple[float, float], ...]
  known: np.ndarray | None

  @classmethod
  def of(cls, sample: _Sample, maps, heads, last_head, listed) -> "_Judged":
    held = sample.looked_at
    best = np.argmax(sample.last[held] @ last_head, axis=1)
    read, agrees, agreement, known = [], [], [], []
    for number, (head, (kernel, bias)) in enumerate(zip(heads, maps, strict=True)):
      x = sample.exits[number, held]
      read.append(x + x @ kernel + bias)
      agrees.append(np.argmax(read[-1] @ head, axis=1) == best)
      before = float((np.argmax(x @ head, axis=1) == best).mean())
      agreement.append((before, float(agrees[-1].mean())))
      if listed is not None:
        logits = jnp.asarray(read[-1] @ head[:, list(listed)])
        top, second = confidence.top_two(logits)
        sure = confidence.softmax_margin(logits), confidence.certainty(logits)
        of_head = np.stack([jnp.log1p(top - second), *sure], axis=-1)
        known.append(np.concatenate([of_head, sample.scalars[number, held]], axis=-1))
    return cls(
      np.stack(read), np.stack(agrees), tuple(agreement), np.stack(known) if known else None
    )

  def classifier(self) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias for the states of all exit layers."""
    weights, bias = _logistic(self.read.reshape(-1, self.read.shape[-1]), self.agrees.ravel())
    return weights[:, None], np.array([bias])

  def probes(self, layers: Sequence[int], num_layers: int):
    """Kernels, weights of features and biases, a column a layer; None without a shortlist."""
    if self.known is None:
      return None
    emb_dim = self.read.shape[-1]
    made = np.zeros((emb_dim + evidence.NUM_FEATURES + 1, num_layers - 1))
    for number, layer in enumerate(layers):
      seen = np.concatenate([self.read[number], self.known[number]], axis=1)
      made[:-1, layer - 1], made[-1, layer - 1] = _logistic(seen, self.agrees[number])
    return made[:emb_dim], made[emb_dim:-1], made[-1]


def _logistic(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
  """Weights and bias of a logistic regression; of the penalties the one that predicts every
  second token best from the others."""
  mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
  unit, labels = (features - mean) / spread, labels.astype(float)
  least, penalty = np.inf, _LOGISTIC_PENALTIES[0]
  for each in _LOGISTIC_PENALTIES:
    weights, bias = _newton(unit[::2], labels[::2], each / 2)
    margin = (unit[1::2] @ weights + bias) * np.where(labels[1::2] > 0, 1, -1)
    if (loss := np.logaddexp(0.0, -margin).sum()) < least:
      least, penalty = loss, each
  weights, bias = _newton(unit, labels, penalty)
  return weights / spread, float(bias - mean @ (weights / spread))


def _newton(features: np.ndarray, labels: np.ndarray, penalty: float):
  """The minimum of the log loss plus penalty / 2 |w|^2, by damped Newton steps."""
  rows = np.concatenate([features, np.ones((len(features), 1))], axis=1)
  ridge = np.full(rows.shape[1], penalty)
  ridge[-1] = 1e-3
  weights = np.zeros(rows.shape[1])
  signs = np.where(labels > 0, 1.0, -1.0)
  loss = lambda w: np.logaddexp(0.0, -signs * (rows @ w)).sum() + 0.5 * (ridge * w * w).sum()
  for _ in range(30):
    chance = 1.0 / (1.0 + np.exp(-np.clip(rows @ weights, -30.0, 30.0)))
    slope = rows.T @ (chance - labels) + ridge * weights
    curve = (rows * (chance * (1.0 - chance))[:, None]).T @ rows + np.diag(ridge)
    step = np.linalg.solve(curve, slope)
    size = 1.0
    while loss(weights - size * step) > loss(weights) and size > 1e-3:
      size /= 2
    weights = weights - size * step
    if np.abs(size * step).max() < 1e-5:
      break
  return weights[:-1], weights[-1]


def _loss(maps, exits, last, drawn, heads, last_head, *, columns):
  """Mean over tokens and layers of -sum_v p_v log q_v, in nats.

  Sums over a large vocabulary are those over `columns` and, for all others, over `drawn` ones,
  each of which stands for as many as there are to one of them.
  """
  kernels, biases = maps
  pieces = jnp.concatenate([columns, drawn])
  others = last_head.shape[0] - columns.shape[0]
  stands_for = np.zeros(pieces.shape[0], np.float32)
  if drawn.shape[0]:
    stands_for[columns.shape[0] :] = np.log(others / drawn.shape[0])
  read = lambda x, head: jax.nn.log_softmax(x @ head[pieces].T + stands_for[None], axis=-1)
  target = jnp.exp(read(last, last_head))
  total = 0.0
  for number, head in enumerate(heads):
    x = exits[number] + exits[number] @ kernels[number] + biases[number][None]
    total -= jnp.mean(jnp.sum(target * read(x, head), axis=-1))
  return total / len(heads)
