"""A T5 decoder as the loop over drafts asks for it: `verified.Passes` of real weights."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from calm import exits
from calm.decode import drafting, engines, loop, ordering, verified
from calm.decode.verified_state import Drafted
from calm.exits import verified as verified_lib
from calm.exits.layers import Greedy, greedy
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib
from calm.t5 import decoder as decoder_lib
from calm.t5 import (
  decoder_weights,
  eight_bits,
  kernels,
  network,
  platforms,
)

# Drafts for eight rows and more must promise more: rows that differ in what is accepted wait
# for each other, and drafts may be worse than is hoped for. With 8 rows of T5 1.1 small, x1.09
# was promised at an acceptance of 0.9; where 0.84 were accepted, x0.93 came, and x0.92 with 32.
MANY_ROWS, MANY_ROWS_HOPE = 8, 1.1
# One row of layers so small that XLA:CPU wakes a thread for products of a few rows, and of one
# makes them alone, has no drafts: with good ones the model in the box came x0.92 to x1.08 of
# full depth without native functions, and x0.93 with bad ones.


@struct.dataclass
class Read:
  """A position of every row after the first layers.

  Attributes:
    hidden: d^k, [batch, emb].
    past: biases of the keys before it, for all layers or each.
  """

  hidden: jax.Array
  past: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class BoundPasses:
  """Passes over some prompts.

  Attributes:
    task: what is decoded; its length is that of the caches.
    rule: its rule.
    sizes: positions that a pass may verify, ascending; it takes the first that is enough.
    table: biases by position.
  """

  task: engines.Task
  rule: exits.Verified
  sizes: tuple[int, ...]
  table: attention_lib.BiasTable

  @property
  def num_layers(self) -> int:
    return self.task.config.num_decoder_layers

  def empty(self) -> tuple[caches_lib.Cache, ...]:
    return self.task.empty_caches()

  @property
  def shortens(self) -> bool:
    return len(self.sizes) > 1

  def room(self, batch_size: int) -> jax.Array:
    config = self.task.config
    shape = batch_size, self.rule.window, config.emb_dim
    return jnp.zeros(shape, jnp.dtype(config.dtype))

  def keep(self, work: jax.Array, read: Read, at: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(work, read.hidden[:, None], at, axis=1)

  def read(self, cache, token: jax.Array, positions: jax.Array):
    k = self.rule.draft_layer
    past = attention_lib.past_biases(self.table, positions, self.task.native)
    hidden, rows = self._one(1, self.task.embed(token), cache[:k], past)
    lower = self._written(cache[:k], rows, positions, hidden)
    return Read(hidden, past), (*lower, *cache[k:])

  def look(self, read: Read) -> verified_lib.Draft:
    decoder, weights, layer = self._decoder(), self.task.weights, self.rule.draft_layer
    seen = decoder.read(layer, read.hidden)
    if self.rule.draft_head == "shortlist":
      logits = decoder.shortlist_logits(seen)
      return verified_lib.draft(logits, weights.shortlist_ids)
    best = decoder.greedy(layer, seen)
    if best is not None:
      return verified_lib.Draft(best.token, jnp.exp(best.log_probability))
    return verified_lib.draft(decoder.logits(layer, seen), None)

  def verify(self, cache, positions: jax.Array, drafted: Drafted, made, threshold):
    lower, upper = cache[: self.rule.draft_layer], cache[self.rule.draft_layer :]
    first = self.rule.draft_layer + 1
    hidden, upper = self._several(first, drafted.work, upper, positions)
    best, gap = self._said(hidden)
    said = best.token, best.log_probability, gap(drafted.tokens.reshape(-1))
    said = verified_lib.Said(*(x.reshape(drafted.tokens.shape) for x in said))
    return verified_lib.verdict(said, drafted.tokens, made[None], threshold), (*lower, *upper)

  def verify_one(self, cache, positions: jax.Array, read: Read):
    lower, upper = cache[: self.rule.draft_layer], cache[self.rule.draft_layer :]
    hidden, rows = self._one(self.rule.draft_layer + 1, read.hidden, upper, read.past)
    upper = self._written(upper, rows, positions, hidden)
    return *self._said(hidden), (*lower, *upper)

  def _said(self, hidden: jax.Array) -> tuple[Greedy, Callable[[jax.Array], jax.Array]]:
    """What the last layer's head says, of its logits or without them; and of any token how far
    its logit is above that of the likeliest."""
    decoder, last = self._decoder(), self.num_layers
    read = decoder.read(last, hidden)
    if isinstance(self.task.weights.heads[-1], eight_bits.QuantizedHead):
      best = decoder.greedy(last, read)
      assert best is not None  # so says the head
      score = lambda token: decoder.score(last, read, token)
    else:
      logits = decoder.logits(last, read)
      best = greedy(logits)
      score = lambda token: jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return best, lambda token: score(token) - score(best.token)

  def _one(self, first: int, hidden: jax.Array, caches, past: tuple[jax.Array, ...]):
    """Layers from `first` on over one position of every row, [batch, emb]; then their rows."""
    decoder, rows = self._decoder(past), []
    for layer, cache in enumerate(caches, start=first):
      hidden, row = decoder.run(layer, hidden, cache)
      rows.append(jax.tree.map(lambda x: x[:, :, None], row))
    return hidden, rows

  def step(self, current, position, active, cache):
    made, cache = self._full_depth(current, position, active, cache)
    # An argmax that no draft competes with is as likely as the argmax.
    return dataclasses.replace(made, confidence=active.astype(jnp.float32)), cache

  @functools.cached_property
  def _full_depth(self) -> loop.Step:
    static = dataclasses.replace(self.task, rule=exits.StaticExit())
    return engines.Eager()(static).take_step

  def _several(self, first: int, states: jax.Array, caches, positions: jax.Array):
    """The same over positions beside each other, [batch, positions, emb]: [rows, emb]."""
    task, decoder = self.task, self._decoder()
    biases = attention_lib.window_biases(self.table, positions, states.shape[1], task.native)
    hidden, made = states.reshape(-1, states.shape[-1]), []
    for layer, cache in enumerate(caches, start=first):
      row = decoder.project(layer, hidden)
      window = jax.tree.map(lambda x: attention_lib.by_window(x, task.batch_size), row)
      made.append(self._write(cache, window, positions))
      attention = attention_lib.WindowAttention(
        made[-1],
        biases[min(layer, len(biases)) - 1],
        task.encoded.cross[layer - 1],
        task.encoded.bias,
        task.config.float32_attention_logits,
        task.native,
        decoder.single_threaded(hidden),
      )
      hidden = decoder.run_projected(layer, hidden, row, attention)
    return hidden, tuple(made)

  def _write(self, cache: caches_lib.Cache, window, positions: jax.Array) -> caches_lib.Cache:
    """Every row's window written at its position."""
    return attention_lib.write_window(cache, window, positions)

  def _written(self, caches, rows, positions: jax.Array, last: jax.Array):
    """Every layer's cache with its row [batch, heads, 1, head_dim] written at `positions`, once
    that leads to `last`."""
    each = zip(caches, rows, ordering.after_each(positions, rows, last), strict=True)
    return tuple(attention_lib.write_window(cache, row, where) for cache, row, where in each)

  def _decoder(self, past: tuple[jax.Array, ...] = ()) -> decoder_lib.DecoderStep:
    """The decoder at one position of every row, `past` the biases of the keys before it."""
    task = self.task
    return decoder_lib.DecoderStep(
      task.weights, task.config, task.encoded, past, self.table.current, task.native
    )


def bind(task: engines.Task, rule: exits.Verified, eos_id: Any) -> verified.Verifying:
  """The loop at work on a task.

  Args:
    task: what is decoded; its length is that of the text. The caches get a window more, so
      that the passes that rows wait through once theirs has ended have room.
    rule: its rule.
    eos_id: the token that ends a row.

  Raises:
    ValueError: the rule does not fit the model, or wants a shortlist that it has not.
  """
  rule.depth(task.config.num_decoder_layers)
  if rule.draft_head == "shortlist" and task.weights.shortlist is None:
    raise ValueError(
      "Expected a model with a shortlist of likely tokens for `draft_head` 'shortlist', got"
      " none; give `shortlist` (token ids), or use `draft_head='full'`."
    )
  roomy = dataclasses.replace(task, length=cache_length(rule, task.length))
  table = attention_lib.bias_table(task.weights, task.config, roomy.length)
  passes = BoundPasses(roomy, rule, _sizes(rule), table)
  made = plan(task.config, task.weights, rule, task.batch_size, task.native)
  return verified.Verifying(passes, rule, made, task.threshold, task.length, eos_id)


def cache_length(rule: exits.Verified, length: int) -> int:
  """Positions of the caches of passes that begin at one of the first `length`."""
  return length + rule.window


def _sizes(rule: exits.Verified) -> tuple[int, ...]:
  """One position and the whole window where the rule lets passes be shorter, else the window.

  Each is a program of its own to compile, and one between would hardly be faster: most of what
  several rows cost, the second one does (`_rows`).
  """
  shorter = rule.adapts or rule.stop_below > 0
  return (1, rule.window) if shorter else (rule.window,)


def plan(
  config: network.T5Config,
  weights: decoder_weights.DecoderWeights,
  rule: exits.Verified,
  batch: int,
  is_native: bool,
) -> drafting.Plan:
  """What passes of every length cost, by the weights that they read and the rows they have.

  Args:
    config: the model's sizes.
    weights: its decoder.
    rule: how many tokens are drafted.
    batch: rows.
    is_native: see `engines.Task.native`.
  """
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  numbers = count(dataclasses.replace(weights.layers[0], cross_key_value=()))  # once a prompt
  matrix = weights.layers[0].mlp_out
  small = is_native and kernels.single_threaded(matrix, 1)

  def layer(positions: int) -> float:
    kept = _small(batch, positions) if small else _layer(matrix, batch * positions)
    return kept * numbers

  def head(positions: int) -> float:
    matrix = weights.heads[0]
    if small and not isinstance(matrix, eight_bits.QuantizedHead):
      return _small(batch, positions) * matrix.size
    return _head(matrix, batch * positions)

  sizes, costs = _sizes(rule), []
  short = head(1)
  if rule.draft_head == "shortlist":
    short = (_small(batch, 1) if small else _rows(batch)) * count(weights.shortlist)
  translator = weights.translators.get(rule.draft_layer)
  short += (_small(batch, 1) if small else _rows(batch)) * count(translator)
  below, above = rule.draft_layer, config.num_decoder_layers - rule.draft_layer
  for positions in range(1, rule.window + 1):
    size = next(size for size in sizes if size >= positions)
    drafts = positions * below * layer(1) + (positions - 1) * short
    rest = above * layer(size) + head(size)
    # A turn of the loop takes about a layer's time besides.
    costs.append(numbers + drafts + rest)
  return drafting.Plan(tuple(costs), _hope(matrix, batch, small), rule.adapts)


def _hope(matrix: decoder_weights.Matrix, batch: int, small: bool) -> float:
  """`drafting.Plan.hope`; `small`: one thread multiplies the layers (`kernels`)."""
  wakes = platforms.wakes_threads() and kernels.is_small(matrix) and not small
  if batch == 1 and wakes:
    return math.inf
  return 1.0 if batch < MANY_ROWS else MANY_ROWS_HOPE


def _head(head: jax.Array | eight_bits.QuantizedHead, rows: int) -> float:
  """Time of the head over so many rows, in float32 numbers that are read for one.

  8 bits beside one row in float32, on two CPU cores (products of T5 1.1 small's head): 2 rows
  0.3 of its time, 4 rows 0.3, 8 rows 0.5, 16 rows 0.8, 32 rows 1.4; 1.3 to 1.9 times as much
  where both sides have a sign. One row takes as long as 2.

  A float32 head writes the logits of several positions, and they are read again: 1.3 times its
  product. So passes of 2, 4 and 8 positions of T5 1.1 small say 1.8, 2.2 and 3.1 steps of one,
  and took 1.7, 2.1 and 3.1; with the head in 8 bits 1.6, 2.1 and 3.2 for 1.5, 2.1 and 3.2.
  """
  if not isinstance(head, eight_bits.QuantizedHead):
    return _rows(rows) * (1.0 if rows <= platforms.least_rows() else 1.3) * head.size
  if platforms.least_rows() > 1:  # a TPU: what the bytes take
    return _rows(rows) * head.rows.size / 4
  signed = 0.4 + 0.07 * max(rows, eight_bits.LEAST_ROWS)
  return (signed / 2 if platforms.multiplies_unsigned() else signed) * head.rows.size


def _layer(matrix: decoder_weights.Matrix, rows: int) -> float:
  """Time of layers whose matrices are kept so, over so many rows, over that of whole ones with
  one row."""
  return _in_8_bits(rows) if isinstance(matrix, eight_bits.EightBits) else _rows(rows)


def _rows(rows: int) -> float:
  """Time of layers over so many rows, over that with one row.

  Between what two CPU cores took. Passes of 2, 4 and 8 positions of the model in the box cost
  2.0, 2.7 and 4.0 steps of one (one prompt, k = 2, whole head), where these figures say 1.8,
  2.5 and 3.8; of T5 1.1 small 8 rows take 1.4 (head) to 1.9 (layers) times as long as one, 32
  take 4 to 5 times. A TPU computes a tile of rows for one.
  """
  if rows <= platforms.least_rows():
    return 1.0
  return 1.5 + 0.05 * rows if rows <= 8 else 1.9 * (rows / 8) ** 0.75


def _small(batch: int, positions: int) -> float:
  """Time of layers that one thread multiplies (`kernels`), over that with one row.

  Between what one of two CPU cores took of the model in the box (AMD EPYC, k = 2, whole head).
  A step of 2, 4 and 8 rows took 1.5, 2.4 and 3.0 times as long as one of one row, where these
  figures say 1.4, 2.2 and 3.0. In steps of as many rows, passes that verify a window of 8 took,
  of 2 and of 8 positions, 2.4 to 2.8 and 4.1 to 4.5 (one row), 3.0 to 3.3 and 4.5 to 4.8 (2
  rows), 2.9 to 3.5 and 4.7 to 4.9 (4 rows); these figures say 3.2 and 5.0, 3.5 and 5.4 of
  several rows.

  Of one row 2.2 and 4.0: drafts that are right come in runs, and a fifth less than the truth
  was best for good drafts, and as good as the truth for middling ones (1, 0.8, 0.65 and 0.5 of
  it, three tasks). Of 2 and 4 rows less than the truth cost middling drafts up to a fifth more,
  and good ones of one task of two were made faster by it.
  """
  rows = batch * positions
  if positions == 1:
    return min(0.6 + 0.4 * rows, 1.4 + 0.2 * rows)
  window = 1.1 + 0.22 * rows if rows <= 8 else 2.86 * (rows / 8) ** 0.8
  return 0.8 * window if batch == 1 else window


def _in_8_bits(rows: int) -> float:
  """Time of layers in 8 bits over so many rows, over that with one row and whole matrices.

  As two CPU cores took it of T5 1.1 small, with the head in 8 bits: passes over 2, 4 and 8
  positions cost 1.7, 2.1 and 2.7 steps of one, where these figures say 1.7, 2.1 and 2.9; four
  rows 2.6, 3.0 and 4.2, and 2.8, 3.3 and 4.2 by these figures.
  """
  return 0.45 + 0.04 * rows
