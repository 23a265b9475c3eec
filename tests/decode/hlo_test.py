"""Programs as users compile them: they agree with the yardstick, and what their
HLO holds.

No cache-sized buffer is made in the decode loop, and full depth asks for no
confidence.
"""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import compiled as compiled_lib
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence, propagation
from calm.t5 import kernels
from tests import engine
from tests.decode import hlo

LENGTH = 512
SHALLOW = exits.DynamicExits(confidence.Classifier())
LEARNED = exits.DynamicExits(
  confidence.Classifier(), propagation=propagation.Learned()
)
SOFTMAX = exits.DynamicExits(confidence.Softmax())
STATIC = exits.StaticExit()
ROWS = len(engine.PROMPTS)
# LLVM, which comes after HLO, need not try hard.
USERS_HLO = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": True,
}


def hlo_of(function, leaves) -> str:
  """The HLO that users' programs are made of."""
  return jax.jit(function).lower(leaves).compile(USERS_HLO).as_text()


def compiled(
  rule,
  made,
  rows: int = 8,
  layers: int = 3,
  length: int = LENGTH,
  native: bool = True,
  maps: bool = False,
  **read,
) -> str:
  """HLO of a toy's decode at B = 8 (or fewer) and length 512 (or less)."""
  every = tuple(range(1, layers))
  given = engine.MAPS | {"exit_translators": every, "exit_propagation": every}
  given = given if maps or rule == LEARNED else {}
  toy = engine.toy(num_decoder_layers=layers, num_encoder_layers=1, **given)
  program = program_lib.Program(
    toy.config, rule, length, engine=made, native=native
  )
  encoded = engine.encode(toy, engine.PROMPTS[:rows])
  weights = toy.weights
  if read:
    weights = program_lib.model_weights(
      toy.params, toy.config, **read, native=native
    )
  args = weights, encoded, jnp.ones(rows, bool), jnp.float32(0)
  leaves, tree = jax.tree.flatten(args)
  return hlo_of(
    lambda leaves: program.decode(*jax.tree.unflatten(tree, leaves)), leaves
  )


def written(text: str, shapes: list[str]) -> list[str]:
  """Operations in the loop that write an array of one of the shapes."""
  return [
    operation.text
    for operation in hlo.in_loops(text)
    if operation.opcode not in hlo.FREE
    and any(shape in operation.text.split("{")[0] for shape in shapes)
  ]


def half_a_layers_cache(rows: int = 8) -> int:
  config = engine.toy().config
  # its keys: half of keys and values
  return rows * config.num_heads * config.head_dim * LENGTH


@pytest.mark.parametrize(
  ("rule", "made", "native"),
  [
    (SHALLOW, engines.Deferred, False),
    (LEARNED, engines.Deferred, True),
    (SHALLOW, engines.Compacted, True),
    (SHALLOW, engines.Eager, True),
    (STATIC, engines.Eager, False),
  ],
)
def test_no_operation_in_the_loop_makes_half_of_a_layers_cache(
  rule, made, native
):
  text = compiled(rule, made, native=native)
  assert not [
    operation.text for operation in hlo.large(text, half_a_layers_cache())
  ]
  # Meta: the loop was found, and in it the updates in place that are excused.
  sizes = [operation.elements for operation in hlo.in_loops(text)]
  assert max(sizes) >= half_a_layers_cache() and len(sizes) > 100


def test_full_depth_has_nothing_of_the_maps_of_its_exits():
  for depth in (None, 2):
    texts = [
      # Arguments are numbered otherwise.
      re.sub(
        r"leaves(_|\[)\d+", "leaves", compiled(rule, None, length=64, maps=maps)
      )
      for rule, maps in (
        (exits.StaticExit(depth), False),
        (exits.StaticExit(depth), True),
      )
    ]
    # Meta: a cut model reads through its translator.
    assert (texts[0] == texts[1]) == (depth is None)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_stage_that_goes_on_makes_no_cache_in_its_loop(drafts):
  """Those of the stage before are copied once, before it."""
  toy = engine.toy(num_decoder_layers=3, num_encoder_layers=1)
  rule = exits.Speculative(1, 3, "full") if drafts else SHALLOW
  made = None if drafts else engines.Deferred
  *_, before, last = program_lib.Program(
    toy.config, rule, LENGTH, engine=made
  ).stages
  known = toy.weights, engine.encode(toy)
  level = jnp.float32(0)
  state = before.start(*known, jnp.zeros(ROWS, bool), level)
  args, tree = jax.tree.flatten((*known, state, level))

  def go_on(leaves):
    return last.go_on(*jax.tree.unflatten(tree, leaves))

  text = hlo_of(go_on, args)
  assert not [
    operation.text for operation in hlo.large(text, half_a_layers_cache())
  ]
  assert (
    max(operation.elements for operation in hlo.in_loops(text))
    >= half_a_layers_cache()
  )


def test_rows_that_stay_read_their_caches_one_at_a_time():
  """A bucket of four of eight rows: nothing in it is as large as the keys of
  two of them.
  """
  two = half_a_layers_cache(2)
  made = engine.sized(engines.Compacted, sizes=(0, 4, 8))
  assert not [
    operation.text for operation in hlo.large(compiled(SHALLOW, made), two)
  ]


@pytest.mark.parametrize(
  "rule", [exits.DynamicExits(confidence.Softmax()), exits.StaticExit()]
)
def test_a_head_in_8_bits_is_neither_widened_nor_copied(rule):
  """Its codes are multiplied as they are, and its float32 rows are only picked
  from.
  """
  if not kernels.available():
    pytest.skip("needs llvmlite")
  text = compiled(rule, None, rows=3, head_dtype="int8")
  made = engine.toy().config
  shapes = [
    f"[{a},{b}]"
    for a, b in itertools.permutations((made.vocab_size, made.emb_dim))
  ]
  assert not written(text, shapes)
  assert "s8[" in text and "calm_rescored" in text


@pytest.mark.parametrize(("rows", "native"), [(1, True), (8, False)])
def test_no_operation_of_a_pass_over_drafts_makes_half_of_a_layers_cache(
  rows, native
):
  """Of one position, of some, and of the whole window; the loop over drafts is
  within.
  """
  rule = exits.Speculative(1, 3, draft_head="full", adapts=native)
  text = compiled(rule, None, rows, native=native)
  found = [
    operation.text for operation in hlo.large(text, half_a_layers_cache(rows))
  ]
  assert not found
  sizes = [operation.elements for operation in hlo.in_loops(text)]
  assert max(sizes) >= half_a_layers_cache(rows) and len(sizes) > 100


def test_the_check_finds_caches_that_are_copied(monkeypatch):
  """Meta: where nothing ties the update to the reads, XLA copies the cache."""
  monkeypatch.setattr(engines, "after", lambda position, made: position)
  text = compiled(
    exits.DynamicExits(confidence.State()), engines.Eager, native=False
  )
  opcodes = {
    operation.opcode for operation in hlo.large(text, half_a_layers_cache())
  }
  assert "copy" in opcodes


DRAFTS = exits.Speculative(1, 3, draft_head="full")


@pytest.mark.parametrize(
  ("rule", "native", "rows"),
  [
    *((STATIC, True, 1), (DRAFTS, True, 1), (DRAFTS, False, 1)),
    *((SHALLOW, False, 1), (SHALLOW, True, 2)),
  ],
)
def test_fewer_than_ten_operations_of_a_few_rows_are_ready_at_once(
  rule, native, rows
):
  """Else XLA:CPU wakes a thread at every token, whatever the number of
  layers.
  """
  assert (
    hlo.most_ready(compiled(rule, None, rows, layers=6, native=native)) < 10
  )


def test_a_pass_without_a_draft_has_hardly_more_operations_than_a_step():
  """Where drafts are bad a text is made of such passes."""
  (step,) = hlo.turns(compiled(STATIC, None, 1, layers=6))
  turns = hlo.turns(compiled(DRAFTS, None, 1, layers=6))
  assert max(turns) <= step + 6


@pytest.mark.parametrize("rows", [8, 9])
def test_embeddings_of_a_few_rows_are_picked_in_one_thread(rows):
  """XLA:CPU parts a gather from a large matrix, and wakes a thread for the
  second half.
  """
  config = dataclasses.replace(
    engine.toy().config, vocab_size=4096, emb_dim=128
  )
  table = jnp.arange(4096.0 * 128).reshape(4096, 128)
  weights = dataclasses.replace(engine.toy().weights.decoder, embedding=table)
  encoded = jax.tree.map(lambda x: x[:1], engine.encode(engine.toy()))
  task = engines.Task(
    config, STATIC, weights, encoded, jnp.ones(()), 4, native=True
  )
  tokens = jnp.arange(rows) * 511

  def embed(table, tokens):
    return dataclasses.replace(
      task, weights=dataclasses.replace(weights, embedding=table)
    ).embed(tokens)

  made = jax.jit(embed).lower(table, tokens).compile()
  np.testing.assert_array_equal(made(table, tokens), table[tokens])
  assert (" gather(" in made.as_text()) == (rows > 8)


def test_the_check_finds_updates_that_are_ready_together(monkeypatch):
  """Meta: where all of them wait for the last layer."""

  def last(position, rows, made):
    return [engines.after(position, made)] * len(rows)

  monkeypatch.setattr(engines, "after_each", last)
  compiled_lib._program.cache_clear()  # those of other tests
  assert (
    hlo.most_ready(compiled(STATIC, None, rows=1, layers=6, native=False)) >= 12
  )


def heads_and_branches(rule, made=None) -> tuple[int, int, bool]:
  """(heads, conditionals, whether confidence code is named) in a program's
  compiled HLO.
  """
  toy = engine.toy()
  args = toy.weights, engine.encode(toy), jnp.ones(ROWS, bool), jnp.float32(0)
  leaves, tree = jax.tree.flatten(args)
  chosen = program_lib.Program(toy.config, rule, engine.LENGTH, engine=made)
  text = hlo_of(
    lambda leaves: chosen.decode(*jax.tree.unflatten(tree, leaves)), leaves
  )
  head = (
    rf"f32\[{ROWS},{engine.columns(toy.weights.decoder.head)}\]\S* "
    r"(?:dot|custom-call)\("
  )
  branches = re.findall(r"= .* conditional\(", text)
  return len(re.findall(head, text)), len(branches), "confidence.py" in text


def test_full_depth_holds_one_head_and_no_confidence_code():
  assert heads_and_branches(STATIC) == (1, 0, False)
  assert heads_and_branches(exits.StaticExit(2)) == (1, 0, False)


def test_the_detector_finds_heads_and_confidence_code():
  """Meta: a dynamic program has what the static one must not have."""
  # one choice of a bucket a layer
  assert heads_and_branches(SOFTMAX) == (4, 4, True)
  state = exits.DynamicExits(confidence.State())
  assert heads_and_branches(state, engines.Deferred) == (1, 0, True)


def test_compiled_programs_agree_with_the_yardstick():
  toy = engine.toy()
  for rule, threshold in ((SOFTMAX, 0.6), (STATIC, 0.0)):
    rows = engine.reference_rows(toy, rule, threshold)
    program = program_lib.Program(toy.config, rule, engine.LENGTH)
    level = jnp.asarray(threshold, jnp.float32)
    made = program.decode(
      toy.weights, engine.encode(toy), jnp.ones(ROWS, bool), level
    )
    assert engine.agreeing_rows(rows, made)
