"""Costs of decoding: against XLA's own count, against sums by hand, composed
with exits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import program as program_lib
from calm.exits import confidence, propagation
from calm.t5 import attention as attention_lib
from calm.t5 import caches as caches_lib
from calm.t5 import costs, network
from calm.t5 import decoder as decoder_lib
from tests import toys

# Wide enough that what is not counted (norms, softmaxes, gelu) stays small.
WIDE = {"emb_dim": 192, "num_heads": 3, "head_dim": 64, "mlp_dim": 256}
DEEP = {"num_encoder_layers": 2, "num_decoder_layers": 3}
CONFIG = network.T5Config(vocab_size=512, **toys.SMALLEST | WIDE | DEEP)
INPUT = 48
CACHE = 32


def costs_of(
  config: network.T5Config = CONFIG, **options
) -> costs.DecodingCosts:
  return costs.decoding_costs(
    config, input_length=INPUT, cache_length=CACHE, **options
  )


COSTS = costs_of()


def compiled(function, *arguments) -> costs.Cost:
  """What XLA says of one compiled program."""
  # As leaves: JAX describes arguments by trees of its own, which our
  # annotations refuse.
  leaves, tree = jax.tree.flatten(arguments)
  flat = jax.jit(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))
  # LLVM, which comes after the program that is counted, need not try hard.
  quickly: dict = {"xla_backend_optimization_level": 0}
  analysis = (
    flat.lower(*leaves).compile(compiler_options=quickly).cost_analysis()
  )
  assert analysis is not None
  return costs.Cost(analysis["flops"], analysis["bytes accessed"])


@functools.cache
def xla_step(piece, batch: int) -> costs.Cost:
  """One piece of a step, `piece(layers, hidden [batch, emb])`,
  straight-line.
  """
  weights = program_lib.model_weights(
    toys.params(CONFIG, 0), CONFIG, shortlist=range(64)
  )
  program = program_lib.Program(CONFIG, exits.StaticExit(), CACHE)
  encoded = program.encode(weights, jnp.ones((batch, INPUT), jnp.int32))

  def run(weights, encoded, caches, hidden, position):
    table = attention_lib.bias_table(weights, CONFIG, CACHE)
    decoder = decoder_lib.DecoderStep(
      weights, CONFIG, encoded, table.at(position), table.current
    )
    return piece(decoder.layers(caches), hidden)

  caches = caches_lib.empty_caches(CONFIG, batch, CACHE)
  hidden = jnp.zeros((batch, CONFIG.emb_dim))
  return compiled(run, weights.decoder, encoded, caches, hidden, jnp.asarray(3))


@functools.cache
def static(depth: int):
  """The step of `exits.StaticExit(depth)`."""
  rule = exits.StaticExit(depth)
  zero = jnp.asarray(0)
  return lambda layers, hidden: rule(
    layers, hidden, jnp.ones(hidden.shape[0], bool), jnp.asarray(0.0), zero
  )


@pytest.mark.parametrize("batch", [1, 4])
def test_the_static_step_is_xlas(batch):
  two = xla_step(static(2), batch)
  three = xla_step(static(3), batch)
  assert three.flops == pytest.approx(COSTS.full.flops * batch, rel=0.02)
  assert three.flops - two.flops == pytest.approx(
    COSTS.layer.flops * batch, rel=0.02
  )
  if batch == 1:
    assert three.bytes == pytest.approx(COSTS.full.bytes, rel=0.05)
    assert three.bytes - two.bytes == pytest.approx(COSTS.layer.bytes, rel=0.05)


def by_hand(measure, shortlist=0, allowed=None):
  rule = exits.DynamicExits(measure, allowed=allowed)
  return costs_of(rule=rule, shortlist=shortlist)


def test_what_each_measure_adds_at_an_exit():
  layers = COSTS.layer.flops * 2 + COSTS.propagation.flops
  head = COSTS.head.flops

  def flops(*args, **kwargs):
    return by_hand(*args, **kwargs).early(2).flops - layers

  assert flops(confidence.Softmax()) == 2 * head
  assert flops(confidence.Softmax(), allowed=(2,)) == head
  assert flops(confidence.Shortlist(), shortlist=64) == head + 2 * (
    2 * 192 * 64
  )
  assert flops(confidence.Classifier()) == head + 2 * (2 * 192)
  listed = 2 * 192 * 64
  assert flops(confidence.Probe(), shortlist=64) == head + 2 * (
    listed + 10 * 192
  )
  assert flops(confidence.State()) == head + 2 * (6 * 192)
  # The last layer costs one head of its own, and a static model propagates
  # nothing.
  full = COSTS.full.flops
  assert by_hand(confidence.Softmax()).early(3).flops == full + 2 * head
  assert by_hand(confidence.Classifier(), allowed=()).early(3).flops == full
  one = costs_of(rule=exits.StaticExit(1))
  assert one.early(1) == one.static(1) == COSTS.layer + COSTS.head


def test_maps_cost_what_is_read_through_them():
  maps = dict(
    exit_translators=(2,), exit_propagation=(1, 2), exit_propagation_rank=16
  )
  config = dataclasses.replace(CONFIG, **maps)
  square = 2 * 192 * 192
  rank = 2 * 192 * 16

  def of(config, rule):
    return costs_of(config, rule=rule)

  plain = exits.DynamicExits(confidence.Classifier())

  def added(rule, layer):
    return (
      of(config, rule).early(layer).flops - of(CONFIG, plain).early(layer).flops
    )

  assert [added(plain, layer) for layer in (1, 2, 3)] == [0, square, square]
  learned = dataclasses.replace(plain, propagation=propagation.Learned())
  # A code an exit that is asked, and a prediction a layer that is skipped.
  codes = [added(learned, layer) - added(plain, layer) for layer in (1, 2, 3)]
  assert codes == [rank * (1 + 2), rank * (2 + 1), rank * 2]
  assert (
    of(config, exits.StaticExit(2)).static(2).flops
    == COSTS.static(2).flops + square
  )
  assert of(config, None).full == COSTS.full


# Numbers of the matrices of a layer that a step reads.
EVERY = 6 * 192 * 192 + 3 * 192 * 256
STORED = {
  (None, None): (4, 4),
  (None, "int8"): (4, 1),
  ("bfloat16", None): (2, 2),
  ("bfloat16", "int8"): (2, 1),
  ("int8", None): (1, 1),
  ("int8", "int8"): (1, 1),
}


@pytest.mark.parametrize("dtypes", STORED, ids=str)
def test_weights_are_read_as_they_are_stored(dtypes):
  """Every matrix that a step reads, as it lies in memory, without the steps of
  its codes.
  """
  matrix, head = STORED[dtypes]
  stored = dict(weights_dtype=dtypes[0], head_dtype=dtypes[1])
  narrow = costs_of(**stored)
  made = program_lib.model_weights(
    toys.params(CONFIG, 0), CONFIG, **stored
  ).decoder
  layer = made.layers[0]
  items = {
    leaf.dtype.itemsize for leaf in jax.tree.leaves(layer) if leaf.ndim > 1
  }
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(layer) if leaf.ndim > 1)
  assert items == {matrix} and size == EVERY * matrix
  # Caches are as they were.
  assert COSTS.layer.bytes - narrow.layer.bytes == EVERY * (4 - matrix)
  assert COSTS.propagation.bytes - narrow.propagation.bytes == 2 * 192 * 192 * (
    4 - matrix
  )
  read = getattr(made.head, "coded", made.head)
  assert narrow.head.bytes == max(leaf.nbytes for leaf in jax.tree.leaves(read))
  assert narrow.head.bytes == COSTS.head.bytes * head / 4
  assert narrow.full.flops == COSTS.full.flops


def test_savings_compose_with_recorded_exits_and_skip_padding():
  classifier = by_hand(confidence.Classifier())
  rows = np.array([[1, 3, 0, 0], [2, 2, 2, 0]])
  got = classifier.savings(rows)
  early = classifier.early(1) + classifier.early(2) * 3 + classifier.early(3)
  assert got.flops == pytest.approx(5 * COSTS.full.flops / early.flops)
  assert got.bytes == pytest.approx(5 * COSTS.full.bytes / early.bytes)
  assert got == classifier.savings([(1, 3), (2, 2, 2)])
  assert np.isnan(classifier.savings([[0, 0]]).flops)
