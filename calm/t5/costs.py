"""Analytic FLOPs and bytes of decoding: what a token costs at full depth and at its exit.

Counted are matrix products (a multiplication and an addition are two FLOPs), the weights they
read and the keys and values they read and write; not norms, softmaxes and gelu, under 3 % of a
T5 1.1 small step. XLA counts a loop's body once and the larger branch of a conditional, so that
its own figure for a decode loop is no cost.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.exits import confidence as confidence_lib
from calm.t5 import network


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one piece of a decode step costs: floating-point operations a row, weights that are
  read once a step whatever the number of rows, keys and values read and written a row."""

  flops: float = 0.0
  weight_bytes: float = 0.0
  row_bytes: float = 0.0

  @property
  def bytes(self) -> float:
    """Weights and caches of a step of one row."""
    return self.weight_bytes + self.row_bytes

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.weight_bytes + other.weight_bytes,
      self.row_bytes + other.row_bytes,
    )

  def __mul__(self, times: float) -> "Cost":
    return Cost(self.flops * times, self.weight_bytes * times, self.row_bytes * times)


@dataclasses.dataclass(frozen=True)
class DecodingCosts:
  """The pieces of one decode step; see `decoding_costs`.

  Attributes:
    num_layers: decoder layers L.
    self_attention: of one layer, over `cache_length` positions and the token itself.
    cross_attention: of one layer, over `input_length` positions.
    mlp: of one layer.
    propagation: the key and value of one skipped layer, projected eagerly, and the prediction
      of what it projects where that is learned. (Deferred propagation does the same FLOPs and
      reads the weights once for many positions.)
    head: one full output head.
    translator: of the states of one layer that has one.
    measured: of the measure, and of the code that learned propagation keeps, at every allowed
      layer that a token reaches below the last.
    emitted: after the exit: the head, where the measure has not computed it already.
    allowed: layers after which a token may leave, the last excluded.
    translated: layers that have a translator.
  """

  num_layers: int
  self_attention: Cost
  cross_attention: Cost
  mlp: Cost
  propagation: Cost
  head: Cost
  measured: Cost
  emitted: Cost
  allowed: tuple[int, ...]
  translator: Cost = Cost()
  translated: tuple[int, ...] = ()

  @property
  def layer(self) -> Cost:
    return self.self_attention + self.cross_attention + self.mlp

  def static(self, layers: int) -> Cost:
    """One token of the model that always runs `layers` layers and one head."""
    return self.layer * layers + self.translator * (layers in self.translated) + self.head

  @property
  def full(self) -> Cost:
    """One token at full depth: what every saving is against."""
    return self.static(self.num_layers)

  def early(self, exit_layer: int) -> Cost:
    """One token that leaves after `exit_layer`: layers, measure, propagation and head."""
    if not 1 <= exit_layer <= self.num_layers:
      raise ValueError(f"Expected `exit_layer` in 1 ... {self.num_layers}, got {exit_layer}.")
    reached = [layer for layer in self.allowed if layer <= exit_layer]
    read = self.measured * len(reached)
    read += self.translator * sum(layer in self.translated for layer in reached)
    last = self.head if exit_layer == self.num_layers else self.emitted
    skipped = self.propagation * (self.num_layers - exit_layer)
    return self.layer * exit_layer + skipped + read + last


@dataclasses.dataclass(frozen=True)
class Totals:
  """Costs of generated tokens, at full depth and at the exits taken, one row at a time.

  Attributes:
    tokens: real tokens, EOS included.
    full: all of them at full depth.
    early: all of them at their exits.
  """

  tokens: int
  full: Cost
  early: Cost

  def __add__(self, other: "Totals") -> "Totals":
    return Totals(self.tokens + other.tokens, self.full + other.full, self.early + other.early)

  @property
  def flops_ratio(self) -> float:
    """Full depth's over those of the exits taken (NaN without tokens)."""
    return self.full.flops / self.early.flops if self.tokens else float("nan")

  @property
  def bytes_ratio(self) -> float:
    return self.full.bytes / self.early.bytes if self.tokens else float("nan")

  def __str__(self) -> str:
    if not self.tokens:
      return "no tokens"
    early, full = self.early * (1 / self.tokens), self.full * (1 / self.tokens)
    return (
      f"{early.flops / 1e6:.2f} MFLOP a token against {full.flops / 1e6:.2f} at full depth"
      f" (x{self.flops_ratio:.2f}), {early.bytes / 1e6:.2f} MB read and written a token, one"
      f" row at a time, against {full.bytes / 1e6:.2f} (x{self.bytes_ratio:.2f})"
    )


def decoding_costs(
  config: network.T5Config,
  *,
  input_length: int,
  cache_length: int,
  rule: exits.Rule | None = None,
  num_pieces: int | None = None,
  shortlist: int = 0,
  weights_dtype: str | None = None,
  head_dtype: str | None = None,
) -> DecodingCosts:
  """The costs of a decode step of this model.

  Args:
    config: the model's sizes; caches are in its dtype.
    input_length: positions of the (padded) prompt.
    cache_length: positions in the caches; a step reads them all.
    rule: the exit rule; None, or one without a measure, measures nothing, and a static one
      propagates nothing either.
    num_pieces: columns of the head that are computed (the vocabulary's pieces).
    shortlist: tokens on the shortlist, for measures that ask the head about those only.
    weights_dtype: what weights are stored in, as in `decoder_weights`; None: matrices in
      `config.dtype`, heads in float32.
    head_dtype: 'int8' where the head is read in 8 bits; what is scored again is left out.
  """
  size, emb = jnp.dtype(config.dtype).itemsize, config.emb_dim
  width = config.num_heads * config.head_dim
  stored = size if weights_dtype is None else jnp.dtype(weights_dtype).itemsize
  # Layers in 8 bits leave the heads as they are.
  heads = 4 if weights_dtype in (None, "int8") else stored
  matrix = lambda rows, columns, item=stored: Cost(2.0 * rows * columns, item * rows * columns)
  # Scores and the weighted sum are a product each, over every position.
  attended = lambda length: Cost(4.0 * width * length, 0.0, 2.0 * width * length * size)
  written = Cost(0.0, 0.0, 2.0 * width * size)
  head = matrix(emb, num_pieces or config.vocab_size, 1 if head_dtype == "int8" else heads)
  measured, emitted = _measure_costs(rule, emb, head, matrix(emb, shortlist, heads))
  allowed = rule.allowed if isinstance(rule, exits.DynamicExits) else ()
  propagation = (
    Cost() if isinstance(rule, exits.StaticExit) else matrix(emb, 2 * width) + written
  )
  if exits.mapped_layers(rule, config.num_decoder_layers, config.exit_propagation):
    measured += matrix(emb, config.exit_propagation_rank)
    propagation += matrix(config.exit_propagation_rank, emb)
  return DecodingCosts(
    num_layers=config.num_decoder_layers,
    self_attention=matrix(emb, 4 * width) + attended(cache_length) + written,
    cross_attention=matrix(emb, 2 * width) + attended(input_length),
    mlp=matrix(emb, (len(config.mlp_activations) + 1) * config.mlp_dim),
    propagation=propagation,
    head=head,
    measured=measured,
    emitted=emitted,
    allowed=exits.allowed_layers(allowed, config.num_decoder_layers),
    translator=matrix(emb, emb, heads),
    translated=tuple(config.exit_translators),
  )


def _measure_costs(
  rule: exits.Rule | None, emb: int, head: Cost, shortlist: Cost
) -> tuple[Cost, Cost]:
  """What the rule's measure costs a layer, and what the exit still costs after it."""
  measure = rule.measure if isinstance(rule, exits.DynamicExits) else None
  if measure is None:
    return Cost(), head
  if measure.bound is not None:
    # How often the full head is asked in vain is not recorded: counted is the one that emits.
    return shortlist, head
  if measure.uses_head:
    return head, Cost()
  if isinstance(measure, confidence_lib.Classifier):
    return Cost(2.0 * emb, 4.0 * emb), head
  if measure.uses_shortlist:
    return shortlist + Cost(10.0 * emb, 4.0 * emb), head
  return Cost(6.0 * emb), head


def totals(costs: DecodingCosts, exit_layers: Iterable[Sequence[int] | np.ndarray]) -> Totals:
  """Composes a step's costs with recorded exits, one row at a time.

  Args:
    costs: from `decoding_costs`.
    exit_layers: decoder layers run for each token, one sequence a row; 0 is padding.
  """
  rows = [np.asarray(row, int).ravel() for row in exit_layers]
  layers = np.concatenate(rows) if rows else np.zeros(0, int)
  counts = np.bincount(layers[layers > 0], minlength=costs.num_layers + 1)
  early = Cost()
  for layer in np.flatnonzero(counts):
    early += costs.early(int(layer)) * int(counts[layer])
  tokens = int(counts.sum())
  return Totals(tokens, costs.full * tokens, early)
