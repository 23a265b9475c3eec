"""Attention of prompts that lie one behind the other, each to itself alone,
without padding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from calm.t5.kernels import llvm
from calm.t5.kernels.llvm import (
  FLOAT,
  LANES,
  LEAST,
  Frame,
  Writer,
  constant,
  number,
)

_SUMS = 16  # vectors of sums, which registers hold
# Keys are scored in tiles of at most so many: biases can be read so far behind
# their end.
_LARGEST_TILE = _SUMS * LANES


# Queries that meet a key at once.
def _num_rows(head_dim):
  return max(1, _SUMS // -(-head_dim // LANES))


def attend(begins, counts, query, key, value, biases) -> jax.Array:
  """See `kernels.attend_within`."""
  head_dim = query.shape[-1]
  longest = biases.shape[1] // 2 + 1
  rows = _num_rows(head_dim)
  target = llvm.target(
    f"calm_prompt_attention_{head_dim}",
    lambda w, frame: _write(w, frame, head_dim),
  )
  # Of one prompt: transposed keys, scores, and what sums of weights are
  # multiplied with.
  scratch = (head_dim + rows) * (longest + _LARGEST_TILE) + rows
  shapes = [
    jax.ShapeDtypeStruct(shape, "float32")
    for shape in (query.shape, (scratch,))
  ]
  biases = jnp.pad(biases, ((0, 0), (0, _LARGEST_TILE)))
  return jax.ffi.ffi_call(target, shapes)(
    begins, counts, query, key, value, biases
  )[0]


def _write(w: Writer, frame: Frame, head_dim: int) -> None:
  arguments = [frame.argument(i) for i in range(6)]
  results = [frame.result(i) for i in (0, 1)]
  begins, counts, query, key, value, biases, out, scratch = map(
    frame.numbers, (*arguments, *results)
  )
  heads = frame.size(arguments[2], 1)
  row_size = frame.size(arguments[5], 1)

  def index(array, place):
    return w.sext(w.read(w.item(array, place), llvm.INT), llvm.INDEX)

  no_distance = w.lshr(w.sub(row_size, number(_LARGEST_TILE)), number(1))
  for head, _ in w.loop(number(0), heads, 1):
    for prompt, _ in w.loop(number(0), frame.size(arguments[1], 0), 1):
      begin = index(begins, prompt)
      first = w.mul(w.add(w.mul(begin, heads), head), number(head_dim))
      _Prompt(
        w,
        head_dim,
        index(counts, prompt),
        w.mul(heads, number(head_dim)),
        scratch,
        *(w.item(array, first) for array in (query, key, value, out)),
        bias=w.at(biases, row_size, head, no_distance),
      ).write(w.sub(index(begins, w.add(prompt, number(1))), begin))


@dataclasses.dataclass
class _Prompt:
  """One prompt and one head; arrays are addresses of their first numbers."""

  w: Writer
  head_dim: int
  count: Any  # tokens
  row_size: Any  # numbers of a token
  scratch: Any
  query: Any
  key: Any
  value: Any
  out: Any
  bias: Any  # of distance 0

  def __post_init__(self):
    w = self.w
    self.rows = _num_rows(self.head_dim)
    self.tile = LANES * (_SUMS // self.rows)
    self.stride = w.below(w.add(self.count, number(self.tile - 1)), self.tile)
    self.weights = w.at(
      self.scratch, self.stride, number(self.head_dim), number(0)
    )
    self.scales = w.at(self.weights, self.stride, number(self.rows), number(0))
    self.parts = w.parts_of(self.head_dim)

  def write(self, room: Any) -> None:
    """Its result, and zeros behind it, up to its `room` in tokens."""
    w = self.w
    zero = number(0)
    for token, _ in w.loop(self.count, room, 1):
      for part, mask in self.parts:
        w.write(constant(0.0), w.at(self.out, self.row_size, token, part), mask)
    for token, _ in w.loop(zero, self.count, 1):
      for d in map(number, range(self.head_dim)):
        entry = w.read(w.at(self.key, self.row_size, token, d), FLOAT)
        w.write(entry, w.at(self.scratch, self.stride, d, token))
    last = w.sub(self.count, number(1))
    for row, _ in w.loop(zero, self.count, self.rows):
      # The last row again where there are no more: a tail needs no code of its
      # own.
      tokens = [w.least(w.add(row, number(r)), last) for r in range(self.rows)]
      self._score(tokens)
      for r, _ in w.loop(zero, number(self.rows), 1):
        self._weigh(r)
      self._mix(tokens)

  def _score(self, tokens: list[Any]) -> None:
    """query . key + bias, of some queries and all keys."""
    w = self.w
    vectors = [number(i) for i in range(0, self.tile, LANES)]
    for column, _ in w.loop(number(0), self.stride, self.tile):
      sums: list[Any] = [constant(0.0)] * _SUMS
      for d, values in w.loop(number(0), number(self.head_dim), 1, sums):
        keys = w.at(self.scratch, self.stride, d, column)
        factors = [
          w.read(w.at(self.query, self.row_size, token, d), FLOAT)
          for token in tokens
        ]
        self._add_products(
          values, factors, [w.read(w.item(keys, v)) for v in vectors]
        )
      for i, sum_ in enumerate(sums):
        r, v = divmod(i, len(vectors))
        at = w.add(column, vectors[v])
        bias = w.read(w.item(self.bias, w.sub(at, tokens[r])))
        w.write(
          w.fadd(sum_, bias), w.at(self.weights, self.stride, number(r), at)
        )

  def _add_products(
    self, sums: list[Any], factors: list[Any], vectors: list[Any]
  ) -> None:
    w = self.w
    for r, factor in enumerate(map(w.spread, factors)):
      for i, vector in enumerate(vectors, start=r * len(vectors)):
        sums[i] = w.fused(factor, vector, sums[i])

  def _weigh(self, r: Any) -> None:
    """e^(score - largest) of a query's keys, and one over their sum."""
    w = self.w
    scores = self.w.at(self.weights, self.stride, r, number(0))
    peaks = list[Any]([constant(LEAST)])
    totals = list[Any]([constant(0.0)])
    for _, part, _ in w.parts(scores, number(0), self.count, peaks, LEAST):
      peaks[0] = w.larger(part, peaks[0])
    peak = w.spread(w.folded(peaks[0], w.larger))
    for place, part, mask in w.parts(scores, number(0), self.count, totals):
      weight = w.exp(w.fsub(part, peak))
      if mask is not None:
        weight = w.select(mask, weight, constant(0.0))
      w.write(weight, w.item(scores, place), mask)
      totals[0] = w.fadd(totals[0], weight)
    scale = w.fdiv(FLOAT(1.0), w.folded(totals[0], w.fadd))
    w.write(scale, w.item(self.scales, r))

  def _mix(self, tokens: list[Any]) -> None:
    """Values by their weights."""
    w = self.w
    rows = list(map(number, range(self.rows)))
    sums: list[Any] = [constant(0.0)] * (self.rows * len(self.parts))
    for key, values in w.loop(number(0), self.count, 1, sums):
      places = [
        (w.at(self.value, self.row_size, key, part), mask)
        for part, mask in self.parts
      ]
      factors = [
        w.read(w.at(self.weights, self.stride, r, key), FLOAT) for r in rows
      ]
      self._add_products(
        values, factors, [w.read_some(*place) for place in places]
      )
    for i, sum_ in enumerate(sums):
      r, (part, mask) = i // len(self.parts), self.parts[i % len(self.parts)]
      scale = w.spread(w.read(w.item(self.scales, rows[r]), FLOAT))
      w.write(
        w.fmul(sum_, scale),
        w.at(self.out, self.row_size, tokens[r], part),
        mask,
      )
