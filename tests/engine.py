"""Toy models bound to the decode engine and to the yardstick, each program
compiled once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.decode import engines, loop
from calm.decode import program as program_lib
from calm.exits import propagation, schedules
from calm.t5 import caches as caches_lib
from calm.t5 import network, tiles
from tests import reference, toys

LENGTH = 8
PROMPTS = toys.prompts(
  2, batch=8, length=12, num_pieces=toys.Config().num_pieces
)
DECAYING = schedules.Decaying(temperature=4.0, max_length=LENGTH)
# Fields of a toy whose exits are translated and which predicts skipped layers'
# inputs.
TRANSLATED: dict[str, Any] = {"exit_translators": (1, 2, 3)}
MAPS: dict[str, Any] = TRANSLATED | {
  "exit_propagation": (1, 2, 3),
  "exit_propagation_rank": 5,
}

# Toys compute in no time and compile for long: LLVM need not try hard.
# `decode/hlo_test.py` has the programs as users compile them.
_decode_state = jax.jit(
  program_lib.Program.decode_state,
  static_argnums=0,
  compiler_options={"xla_backend_optimization_level": 0},
)


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
  """One random model: for the engine (`config`, `weights`) and for the
  yardstick.
  """

  sizes: toys.Config
  params: dict[str, Any]
  config: network.T5Config
  weights: program_lib.ModelWeights
  reference: reference.Model


@functools.cache
def toy(
  seed: int = 1, sharpness: float = 4.0, dtype: str = "float32", **changes
) -> Toy:
  sizes = toys.Config(**changes)
  params = toys.params(sizes, seed, sharpness=sharpness)
  return of_params(params, sizes, dtype)


def toy_for(rule: exits.DynamicExits, **changes) -> Toy:
  """A toy with what the rule's measure and propagation read."""
  probed = {"exit_probes": True} if rule.measure.part == "exit_probes" else {}
  learned = MAPS if isinstance(rule.propagation, propagation.Learned) else {}
  return toy(**{**probed, **learned, **changes})


def of_params(
  params: dict[str, Any], sizes: toys.Config, dtype: str = "float32"
) -> Toy:
  config = network.T5Config(dtype=dtype, **toys.network_fields(sizes))
  listed = toys.shortlist(sizes)
  native = dtype == "float32"
  weights = program_lib.model_weights(
    params, config, sizes.num_pieces, listed, native=native
  )
  model = reference.Model(params, sizes, sizes.num_pieces, shortlist=listed)
  return Toy(sizes, params, config, weights, model)


def columns(matrix: Any) -> int:
  """Of its products, maybe in tiles."""
  return (
    matrix.numbers[:, 0].size
    if isinstance(matrix, tiles.Tiles)
    else matrix.shape[1]
  )


def sized(kind: engines.Engine, **values: Any) -> engines.Engine:
  """An engine with other sizes of chunks or buckets."""
  return type("Sized", (kind,), values)


def encode(toy: Toy, prompts: np.ndarray = PROMPTS) -> caches_lib.Encoded:
  """One encoding program for all rules."""
  program = program_lib.Program(toy.config, exits.StaticExit(), LENGTH)
  return program.encode(toy.weights, jnp.asarray(prompts))


def run(
  toy: Toy,
  rule: exits.Rule,
  threshold=0.0,
  prompts=PROMPTS,
  active=None,
  engine: engines.Engine | None = None,
) -> loop.DecodingState:
  """Decodes `prompts`; the final state, caches included."""
  active = (
    jnp.ones(len(prompts), bool) if active is None else jnp.asarray(active)
  )
  return _decode_state(
    program_lib.Program(toy.config, rule, LENGTH, engine=engine),
    toy.weights,
    encode(toy, prompts),
    active,
    jnp.asarray(threshold, jnp.float32),
  )


def reference_rows(
  toy: Toy, rule, threshold=0.0, prompts=PROMPTS
) -> list[reference.Decoded]:
  """What the yardstick makes of the same rule, row by row."""
  if isinstance(rule, exits.StaticExit):
    depth = rule.depth(toy.sizes.num_decoder_layers)
    return [
      reference.decode_static(
        toy.reference, prompt, depth, max_decode_length=LENGTH
      )
      for prompt in prompts
    ]
  measure = "oracle"
  schedule = reference.constant
  if isinstance(rule, exits.DynamicExits):
    measure = rule.measure.name
    if isinstance(rule.schedule, schedules.Decaying):
      schedule = reference.decaying(
        rule.schedule.temperature, rule.schedule.max_length
      )
  same = reference.ExitRule(
    measure, threshold, schedule, rule.allowed, rule.propagation.name
  )
  return [
    reference.decode_dynamic(
      toy.reference, prompt, same, max_decode_length=LENGTH
    )
    for prompt in prompts
  ]


def agreeing_rows(
  rows: list[reference.Decoded], generation: loop.Generation
) -> list[int]:
  """Rows with the yardstick's tokens and exits; any other must begin with a
  tie, and few do.
  """
  agreeing = []
  for i, row in enumerate(rows):
    at = row.first_difference(
      np.asarray(generation.tokens[i]).tolist(),
      np.asarray(generation.exit_layers[i]).tolist(),
    )
    assert at is None or row.ties[at], (
      f"row {i} differs from token {at} on, and no tie"
    )
    if at is None:
      agreeing.append(i)
  assert len(rows) - len(agreeing) <= int(0.005 * len(rows))
  return agreeing


def assert_same_rows(
  toy: Toy,
  a: loop.DecodingState,
  b: loop.DecodingState,
  rule,
  threshold=0.0,
  **options,
) -> None:
  """Two programs decode the same: tokens, exits, confidences, scores and
  caches.
  """
  rows = reference_rows(toy, rule, threshold, **options)
  both = set(agreeing_rows(rows, a.generation)) & set(
    agreeing_rows(rows, b.generation)
  )
  for i in both:
    assert_same_row(a, b, i, i)


def assert_same_row(
  a: loop.DecodingState, b: loop.DecodingState, i: int, j: int
):
  """Row i of one state is row j of another, caches up to the last real
  token.
  """
  left = a.generation
  right = b.generation
  for name in ("tokens", "exit_layers"):
    np.testing.assert_array_equal(
      getattr(left, name)[i], getattr(right, name)[j]
    )
  np.testing.assert_allclose(
    left.scores[i], right.scores[j], rtol=1e-4, atol=1e-4
  )
  length = lengths(left)[i]
  for cache, other in zip(a.cache, b.cache, strict=True):
    keys = cache.keys[i, :, :length], other.keys[j, :, :length]
    values = cache.values[i, :, :length], other.values[j, :, :length]
    np.testing.assert_allclose(*keys, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4)


def lengths(generation: loop.Generation) -> np.ndarray:
  """Real tokens of each row."""
  return (np.asarray(generation.exit_layers) > 0).sum(axis=1)


def mean_layers(generation: loop.Generation) -> float:
  return np.asarray(generation.exit_layers).sum() / lengths(generation).sum()


def assert_same_confidences(
  a: loop.Generation, b: loop.Generation, i: int, j: int
):
  for name in ("confidences", "rejected_confidences"):
    np.testing.assert_allclose(
      getattr(a, name)[i], getattr(b, name)[j], atol=1e-4
    )


def compare(toy, rule, threshold, prompts=PROMPTS, engine=None) -> np.ndarray:
  """Holds everything of one run against the yardstick; exit layers of the real
  tokens.
  """
  state = run(toy, rule, threshold, prompts, engine=engine)
  rows = reference_rows(toy, rule, threshold, prompts)
  for i in compare_generation(rows, state.generation):
    compare_memory(state.cache, rows[i], i, len(rows[i].tokens))
  layers = np.asarray(state.generation.exit_layers)
  return layers[layers > 0]


def compare_generation(
  rows: list[reference.Decoded], got: loop.Generation
) -> list[int]:
  """Holds a generation against the yardstick; the rows without a tie."""
  agreeing = agreeing_rows(rows, got)
  for i in agreeing:
    row = rows[i]
    length = len(rows[i].tokens)
    assert not np.asarray(got.tokens)[i, length:].any()
    assert not np.asarray(got.confidences)[i, length:].any()
    np.testing.assert_allclose(
      got.confidences[i, :length], row.confidences, atol=1e-4
    )
    np.testing.assert_allclose(
      got.rejected_confidences[i, :length], row.rejected_confidences, atol=1e-4
    )
    np.testing.assert_allclose(got.scores[i], row.score, rtol=1e-4, atol=1e-4)
  return agreeing


def compare_memory(caches, row, i: int, length: int) -> None:
  """Keys and values of every layer and position, skipped ones included."""
  for layer, cache in enumerate(caches):
    keys = np.moveaxis(np.asarray(cache.keys[i]), -2, 0)[:length]
    values = np.moveaxis(np.asarray(cache.values[i]), -2, 0)[:length]
    np.testing.assert_allclose(
      keys, np.stack(row.memory.keys[layer]), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
      values, np.stack(row.memory.values[layer]), rtol=1e-4, atol=1e-4
    )
