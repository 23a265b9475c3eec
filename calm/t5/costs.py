"""Analytic FLOPs and bytes of decoding: matrix products, the weights that they
read, keys and values. Norms, softmaxes and gelu, under 3 % of a step, are left
out. (XLA counts a loop's body once: its own figure is no cost.)
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
  """Floating-point operations of one row, and bytes of weights and caches that
  it reads and writes.
  """

  flops: float = 0.0
  bytes: float = 0.0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.flops + other.flops, self.bytes + other.bytes)

  def __mul__(self, times: float) -> "Cost":
    return Cost(self.flops * times, self.bytes * times)


@dataclasses.dataclass(frozen=True)
class DecodingCosts:
  """The pieces of one decode step of one row; see `decoding_costs`."""

  num_layers: int  # decoder layers L
  layer: Cost  # one layer, its attention over whole caches and prompts
  # The key and value of one skipped layer, projected eagerly, and the
  # prediction of what it projects where that is learned. (Deferred propagation
  # does the same FLOPs and reads the weights once for many positions.)
  propagation: Cost
  head: Cost  # one full output head
  # Of the measure, and of the code that learned propagation keeps, at every
  # allowed layer that a token reaches below the last.
  measured: Cost
  # after the exit: the head, where the measure has not computed it already
  emitted: Cost
  # layers after which a token may leave, the last excluded
  allowed: tuple[int, ...]
  translator: Cost  # of the states of one layer that has one
  translated: tuple[int, ...]  # the layers that have one

  def static(self, layers: int) -> Cost:
    """One token of the model that always runs `layers` layers and one head."""
    return (
      self.layer * layers
      + self.translator * (layers in self.translated)
      + self.head
    )

  @property
  def full(self) -> Cost:
    """One token at full depth: what every saving is against."""
    return self.static(self.num_layers)

  def early(self, exit_layer: int) -> Cost:
    """One token that leaves after `exit_layer`: layers, measure, propagation
    and head.
    """
    reached = [layer for layer in self.allowed if layer <= exit_layer]
    read = self.measured * len(reached)
    read += self.translator * sum(layer in self.translated for layer in reached)
    last = self.head if exit_layer == self.num_layers else self.emitted
    skipped = self.propagation * (self.num_layers - exit_layer)
    return self.layer * exit_layer + skipped + read + last

  def savings(self, exit_layers: Iterable[Sequence[int] | np.ndarray]) -> Cost:
    """FLOPs, and bytes, at full depth over those of `exit_layers`, one sequence
    a row: layers run for each token, 0 is padding. NaN without any token.
    """
    rows = [np.asarray(row, int).ravel() for row in exit_layers]
    layers = np.concatenate([np.zeros(0, int), *rows])
    counts = np.bincount(layers[layers > 0], minlength=self.num_layers + 1)
    full = self.full * int(counts.sum())
    early = Cost()
    for layer in np.flatnonzero(counts):
      early += self.early(int(layer)) * int(counts[layer])
    if not counts.sum():
      return Cost(np.nan, np.nan)
    return Cost(full.flops / early.flops, full.bytes / early.bytes)


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
  """The costs of a decode step of a model of these sizes, its caches in their
  dtype.

  Prompts have `input_length` positions, caches `cache_length`, all of which a
  step reads. A static `rule` propagates nothing; None measures nothing.
  `num_pieces` columns of the head are computed, and `shortlist` of them for
  measures that ask for those; `weights_dtype` and `head_dtype` are as in
  `program.model_weights`.
  """
  size = jnp.dtype(config.dtype).itemsize
  emb = config.emb_dim
  width = config.num_heads * config.head_dim
  stored = size if weights_dtype is None else jnp.dtype(weights_dtype).itemsize
  # Translators and shortlists stay as they are beside matrices in 8 bits.
  heads = 4 if weights_dtype in (None, "int8") else stored

  def matrix(rows, columns, item=stored):
    return Cost(2.0 * rows * columns, item * rows * columns)

  # Scores and the weighted sum are a product each, over every position.
  def attended(length):
    return Cost(4.0 * width * length, 2.0 * width * length * size)

  written = Cost(0.0, 2.0 * width * size)
  head = matrix(
    emb,
    num_pieces or config.vocab_size,
    1 if "int8" in (head_dtype, weights_dtype) else heads,
  )
  measured, emitted = _measure_costs(
    rule, emb, head, matrix(emb, shortlist, heads)
  )
  allowed = rule.allowed if isinstance(rule, exits.DynamicExits) else ()
  propagation = (
    Cost()
    if isinstance(rule, exits.StaticExit)
    else matrix(emb, 2 * width) + written
  )
  if exits.mapped_layers(
    rule, config.num_decoder_layers, config.exit_propagation
  ):
    measured += matrix(emb, config.exit_propagation_rank)
    propagation += matrix(config.exit_propagation_rank, emb)
  mlp = matrix(emb, (len(config.mlp_activations) + 1) * config.mlp_dim)
  attention = (
    matrix(emb, 6 * width) + attended(cache_length) + attended(input_length)
  )
  return DecodingCosts(
    num_layers=config.num_decoder_layers,
    layer=attention + written + mlp,
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
  """What the rule's measure costs a layer, and what the exit still costs after
  it.
  """
  measure = rule.measure if isinstance(rule, exits.DynamicExits) else None
  if measure is None:
    return Cost(), head
  if measure.bound is not None:
    # How often the full head is asked in vain is not recorded: counted is the
    # one that emits.
    return shortlist, head
  if measure.uses_head:
    return head, Cost()
  if isinstance(measure, confidence_lib.Classifier):
    return Cost(2.0 * emb, 4.0 * emb), head
  if measure.uses_shortlist:
    return shortlist + Cost(10.0 * emb, 4.0 * emb), head
  return Cost(6.0 * emb), head
