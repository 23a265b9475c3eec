"""Attention of one query after another, compiled by numba.

One query reads the keys and values of its row and head once, in order, and only those from the
first to the last that it may see: a core then waits for memory only. Functions are made for
one size of heads each: with sizes that the compiler does not know they take a fifth longer.
"""

from typing import Any

import numpy as np
from numba import njit

from calm.t5.native import frames
from calm.t5.native.vectors import FAST, exp

_MASKED = np.float32(-1e9)  # biases of keys that nobody sees are lower
_LEAST, _ZERO, _ONE = np.float32(-3e38), np.float32(0), np.float32(1)


@njit(fastmath=FAST)
def seen(bias: Any) -> Any:
  """The first key that is not masked, and the one behind the last such."""
  first, last = 0, len(bias)
  while last > 0 and bias[last - 1] < _MASKED:
    last -= 1
  while first < last and bias[first] < _MASKED:
    first += 1
  return first, last


def scores_of(head_dim: int) -> Any:
  """(query, keys, bias, out) -> the largest score; scores are written to `out`."""

  @njit(fastmath=FAST)
  def scores(query, keys, bias, out):
    peak, count = _LEAST, len(keys)
    for block in range(count // 4):  # four sums side by side
      key = 4 * block
      a = b = c = d = _ZERO
      for i in range(head_dim):
        a += query[i] * keys[key, i]
        b += query[i] * keys[key + 1, i]
        c += query[i] * keys[key + 2, i]
        d += query[i] * keys[key + 3, i]
      a, b = a + bias[key], b + bias[key + 1]
      c, d = c + bias[key + 2], d + bias[key + 3]
      out[key], out[key + 1], out[key + 2], out[key + 3] = a, b, c, d
      peak = max(peak, max(max(a, b), max(c, d)))
    for key in range(count // 4 * 4, count):
      a = _ZERO
      for i in range(head_dim):
        a += query[i] * keys[key, i]
      out[key] = a + bias[key]
      peak = max(peak, out[key])
    return peak

  return scores


def mix_of(head_dim: int) -> Any:
  """(weights, values, out) -> None; the values, weighted, are added to `out`."""

  @njit(fastmath=FAST)
  def mix(weights, values, out):
    count = len(values)
    for block in range(count // 8):  # `out` is read and written once for eight of them
      key = 8 * block
      for i in range(head_dim):
        low = weights[key] * values[key, i] + weights[key + 1] * values[key + 1, i]
        low += weights[key + 2] * values[key + 2, i] + weights[key + 3] * values[key + 3, i]
        high = weights[key + 4] * values[key + 4, i] + weights[key + 5] * values[key + 5, i]
        high += weights[key + 6] * values[key + 6, i] + weights[key + 7] * values[key + 7, i]
        out[i] += low + high
    for key in range(count // 8 * 8, count):
      for i in range(head_dim):
        out[i] += weights[key] * values[key, i]

  return mix


def attend_of(head_dim: int) -> Any:
  """(query, keys, values, bias, now, now_value, weights, out) -> None.

  `out` gets softmax(keys query + bias) values, over one key more of score `now` if that is
  above `_LEAST`; 0 where no key is seen. `weights` is room for one number a key.
  """
  scores, mix = scores_of(head_dim), mix_of(head_dim)

  @njit(fastmath=FAST)
  def attend(query, keys, values, bias, now, now_value, weights, out):
    first, last = seen(bias)
    keys, values, bias = keys[first:last], values[first:last], bias[first:last]
    peak = max(scores(query, keys, bias, weights), now)
    total = _ZERO
    for key in range(len(keys)):
      weights[key] = exp(weights[key] - peak)
      total += weights[key]
    own = exp(now - peak) if now > _LEAST else _ZERO
    total += own
    for i in range(head_dim):
      out[i] = own * now_value[i]
    mix(weights, values, out)
    scale = _ONE / total if total > 0 else _ZERO
    for i in range(head_dim):
      out[i] *= scale

  return attend


def attention(head_dim: int) -> Any:
  """What XLA calls for heads of this size: one piece of `attention.attend`.

  Its arrays, as that function has them: the first query and head of the piece, `rows`,
  `query`, `keys`, `values`, `bias`, and the three of `now` where there are any. The result is
  [heads of the piece, head_dim].
  """
  attend = attend_of(head_dim)

  @njit(fastmath=FAST)
  def piece(frame):
    queries_at, keys_at = frames.argument(frame, 2), frames.argument(frame, 3)
    bias_at, out_at = frames.argument(frame, 5), frames.result(frame, 0)
    heads, length = frames.size(keys_at, 1), frames.size(keys_at, 2)
    asked = frames.size(queries_at, 0), heads, head_dim
    cached = frames.size(keys_at, 0), heads, length, head_dim
    queries, keys = frames.floats(queries_at, asked), frames.floats(keys_at, cached)
    values = frames.floats(frames.argument(frame, 4), cached)
    biases = frames.floats(bias_at, (frames.size(bias_at, 0), frames.size(bias_at, 1), length))
    # What stands in for a key that is not there is not read.
    has_now = frames.num_arguments(frame) > 6
    now_keys = frames.floats(frames.argument(frame, 6 if has_now else 2), asked)
    now_values = frames.floats(frames.argument(frame, 7 if has_now else 2), asked)
    now_bias = frames.floats(frames.argument(frame, 8 if has_now else 5), (heads,))
    begin = frames.integers(frames.argument(frame, 0), (1,))[0]
    rows = frames.integers(frames.argument(frame, 1), (len(queries),))
    out = frames.floats(out_at, (frames.size(out_at, 0), head_dim))
    weights = np.empty(length, np.float32)
    for i in range(len(out)):
      query, head = (begin + i) // heads, (begin + i) % heads
      row = rows[query]
      if row < 0:
        out[i] = _ZERO
        continue
      now = _LEAST
      if has_now:
        now = now_bias[head]
        for j in range(head_dim):
          now += queries[query, head, j] * now_keys[query, head, j]
      own = query if len(biases) == len(queries) else min(row, len(biases) - 1)
      bias = biases[own, min(head, biases.shape[1] - 1)]
      attend(
        queries[query, head], keys[row, head], values[row, head], bias,
        now, now_values[query, head], weights, out[i],
      )  # fmt: skip

  return frames.handler(piece)
