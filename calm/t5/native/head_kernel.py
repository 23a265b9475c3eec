"""The most likely piece of a head in 8 bits, compiled by numba.

A row's logits are made of its 8-bit sums once. Those of pieces that may be the most likely are
made again in float32, however many they are: nothing is sorted, and no row needs another way.
"""

from typing import Any

import numpy as np
from numba import njit

from calm.t5.native import frames
from calm.t5.native.vectors import FAST, exp

_LANES = 16  # numbers that are compared side by side
_LEAST, _ZERO = np.float32(-3e38), np.float32(0)


@njit(fastmath=FAST)
def bounds(sums: Any, head: Any, row: Any, offset: Any, logits: Any, upper: Any) -> None:
  """Writes the logits of the pieces, and the most that they may be.

  Args:
    sums: of products of a row's first and last codes, which may be the same ones, a pair; with
      `offset` times the pieces' codes in them.
    head: (sums of the codes, scales, left, norms) of each piece.
    row: what `left` and what `norms` is multiplied with, then the codes' steps.
    offset: see `EightBits.raw_sums`.
  """
  codes, scales, left, norms = head
  (coarse, fine), step = sums, row[2]
  for j in range(len(coarse)):
    logits[j] = np.float32(coarse[j] - offset * codes[j]) * step
  if len(row) > 3:
    step = row[3]
    for j in range(len(fine)):
      logits[j] += np.float32(fine[j] - offset * codes[j]) * step
  for j in range(len(logits)):
    logits[j] *= scales[j]
    upper[j] = logits[j] + (row[0] * left[j] + row[1] * norms[j])


@njit(fastmath=FAST)
def peaks(logits: Any, upper: Any) -> Any:
  """(the largest logit, the largest that one surely is); NaN counts as nothing."""
  tops, floors = np.full(_LANES, _LEAST), np.full(_LANES, _LEAST)
  for block in range(len(logits) // _LANES):
    for lane in range(_LANES):
      j = block * _LANES + lane
      logit, least = logits[j], logits[j] + (logits[j] - upper[j])
      tops[lane] = logit if logit > tops[lane] else tops[lane]
      floors[lane] = least if least > floors[lane] else floors[lane]
  for j in range(len(logits) // _LANES * _LANES, len(logits)):
    least = logits[j] + (logits[j] - upper[j])
    tops[0] = logits[j] if logits[j] > tops[0] else tops[0]
    floors[0] = least if least > floors[0] else floors[0]
  return tops.max(), floors.max()


@njit(fastmath=FAST)
def total_of(logits: Any, peak: Any) -> Any:
  """sum_j e^(logit_j - peak), peak being the largest."""
  total = _ZERO
  for j in range(len(logits)):
    total += exp(logits[j] - peak)
  return total


@njit(fastmath=FAST)
def dot(state: Any, piece: Any) -> Any:
  """state . piece"""
  total = _ZERO
  for i in range(len(state)):
    total += state[i] * piece[i]
  return total


@njit(fastmath=FAST)
def likeliest(state: Any, pieces: Any, logits: Any, upper: Any) -> Any:
  """(the place of the largest float32 logit, it, the largest rounded one, the sum of all).

  The first of equals; place 0 where every logit is NaN. Sums are e^(logit - the third), with
  float32 logits where these were made.
  """
  peak, floor = peaks(logits, upper)
  total = total_of(logits, peak)
  place, best, better = 0, _LEAST, _ZERO
  for block in range(-(-len(logits) // _LANES)):
    part = slice(block * _LANES, (block + 1) * _LANES)
    asked = False
    for most in upper[part]:
      asked |= most >= floor
    if not asked:
      continue
    for j in range(block * _LANES, min((block + 1) * _LANES, len(logits))):
      if upper[j] >= floor:
        logit = dot(state, pieces[j])
        better += np.exp(logit - peak) - np.exp(logits[j] - peak)
        if logit > best:
          place, best = j, logit
  return place, best, peak, total + better


def head() -> Any:
  """What XLA calls: some parts of some rows of `heads.greedy`.

  Its arrays, as that function has them: (the first part, pieces of a part, `offset`), `sums`
  [codes, rows, pieces], the head's `sums`, `scales`, `left` and `norms`, `rows` (see `bounds`),
  `states`, the head in float32. The results are [parts] places in the head and [parts, 3] of
  what `likeliest` says.
  """

  @njit(fastmath=FAST)
  def piece(frame):
    words = frames.integers(frames.argument(frame, 0), (3,))
    begin, size, offset = words[0], words[1], words[2]
    sums_at, states_at = frames.argument(frame, 1), frames.argument(frame, 7)
    num_codes, batch = frames.size(sums_at, 0), frames.size(states_at, 0)
    count, emb = frames.size(sums_at, 2), frames.size(states_at, 1)
    sums = frames.integers(sums_at, (num_codes, batch, count))
    states = frames.floats(states_at, (batch, emb))
    pieces = frames.floats(frames.argument(frame, 8), (count, emb))
    codes = frames.integers(frames.argument(frame, 2), (count,))
    scales = frames.floats(frames.argument(frame, 3), (count,))
    left = frames.floats(frames.argument(frame, 4), (count,))
    norms = frames.floats(frames.argument(frame, 5), (count,))
    rows = frames.floats(frames.argument(frame, 6), (batch, 2 + num_codes))
    places_at = frames.result(frame, 0)
    places = frames.integers(places_at, (frames.size(places_at, 0),))
    numbers = frames.floats(frames.result(frame, 1), (len(places), 3))
    logits, upper = np.empty(size, np.float32), np.empty(size, np.float32)
    parts = -(-count // size)
    for i in range(len(places)):
      row, low = (begin + i) // parts, (begin + i) % parts * size
      high = min(low + size, count)
      few, most = logits[: high - low], upper[: high - low]
      own = codes[low:high], scales[low:high], left[low:high], norms[low:high]
      bounds(
        (sums[0, row, low:high], sums[-1, row, low:high]), own, rows[row], offset, few, most
      )
      place, best, peak, total = likeliest(states[row], pieces[low:high], few, most)
      places[i] = low + place
      numbers[i, 0], numbers[i, 1], numbers[i, 2] = best, peak, total

  return frames.handler(piece)
