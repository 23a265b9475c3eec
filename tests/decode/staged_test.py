"""Limits in stages: the same texts as in one program, and no stage that no text
needs.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from calm import exits
from calm.decode import engines
from calm.decode import program as program_lib
from calm.exits import confidence
from calm.t5 import caches, platforms
from tests import engine
from tests.decode import resume_test

STATIC = exits.StaticExit()
CLASSIFIER = exits.DynamicExits(confidence.Classifier())


@pytest.fixture
def short(monkeypatch):
  """Stages of 2, 4 and 8 positions."""
  monkeypatch.setattr(program_lib, "FIRST", 2)
  monkeypatch.setattr(program_lib, "RATIO", 2)


def decoded(program, active=None, threshold=0.6, toy=None, stages=False):
  toy = toy or engine.toy()
  active = np.ones(len(engine.PROMPTS), bool) if active is None else active
  run = program.generate if stages else program.decode
  return run(toy.weights, engine.encode(toy), active, np.float32(threshold))


def ending(program, toy=None):
  """The program with an end of texts that some rows say early and others late
  or never.
  """
  said = np.asarray(decoded(program, toy=toy).tokens)
  early = set(said[:, :3].flat)
  late = set(said[:, 4:].flat)
  in_every_row = set.intersection(*(set(row[:4]) for row in said))
  end = min((early & late) - in_every_row)
  return dataclasses.replace(program, eos_id=int(end))


@pytest.mark.parametrize("limit", [1, 127, 128, 256, 511, 512, 4096])
def test_stages_grow_up_to_the_limit_and_none_is_nearly_as_long(limit):
  stages = program_lib.stage_lengths(limit)
  assert stages[-1] == limit and list(stages) == sorted(set(stages))
  assert all(2 * length <= limit for length in stages[:-1])
  assert (len(stages) > 1) == (limit >= 2 * program_lib.FIRST)
  assert all(
    b == program_lib.RATIO * a for a, b in itertools.pairwise(stages[:-1])
  )


# A threshold a row; and passes of six positions, which go beyond stages of two
# and four.
LEVELS = np.linspace(0.5, 0.7, len(engine.PROMPTS))
DRAFTS = exits.Speculative(1, 5, "full")


@pytest.mark.parametrize(
  ("rule", "made", "threshold"),
  [
    (STATIC, None, LEVELS),
    (CLASSIFIER, engines.Compacted, LEVELS),
    (DRAFTS, None, 1.0),
  ],
  ids=["static", "compacted", "drafts"],
)
def test_texts_in_stages_are_those_of_one_program(rule, made, threshold, short):
  program = ending(
    program_lib.Program(engine.toy().config, rule, engine.LENGTH, engine=made)
  )
  # a row holds no prompt
  given = np.arange(len(engine.PROMPTS)) != 1, threshold
  whole = decoded(program, *given)
  stages = decoded(program, *given, stages=True)
  # Meta: rows end in a stage before the last, and in the last.
  ends = set(engine.lengths(whole)[given[0]].tolist())
  assert min(ends) <= 4 and max(ends) == engine.LENGTH
  for a, b in zip(jax.tree.leaves(stages), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.any(a[1])
  np.testing.assert_array_equal(stages.tokens, whole.tokens)
  np.testing.assert_array_equal(stages.exit_layers, whole.exit_layers)


def test_a_grid_goes_on_in_stages_as_in_one_program(short):
  """Threshold after threshold, from where each row changes, in the stage that
  it needs.
  """
  rule, made = resume_test.CASES["learned"]
  toy = engine.toy_for(rule)
  program = ending(
    program_lib.Program(toy.config, rule, engine.LENGTH, engine=made), toy
  )
  known = (toy.weights, engine.encode(toy))
  rows = len(engine.PROMPTS)
  ways = {"whole": program.resume, "stages": program.regenerate}
  states = {
    "whole": program.nothing_yet(rows),
    "stages": program.stages[0].nothing_yet(rows),
  }
  lengths = [caches.length(states["stages"].cache)]
  for threshold in (np.inf, *resume_test.GRID):
    before = states["whole"].generation
    begin = resume_test.first_exits(before, threshold).astype(np.int32)
    active = (begin < engine.lengths(before)) | (threshold == np.inf)
    if not active.any():
      continue
    for way, run in ways.items():
      level = np.float32(threshold)
      states[way] = run(*known, states[way], active, level, begin)
    lengths.append(caches.length(states["stages"].cache))
    got, want = (states[way].generation for way in ("stages", "whole"))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  # Meta: it began with short caches and needed long ones.
  assert lengths[0] == 2 and lengths[-1] == engine.LENGTH and len(lengths) > 3


def test_short_limits_and_other_platforms_have_one_program():
  config = engine.toy().config
  for rule in (STATIC, exits.Speculative(1, draft_head="full")):
    program = program_lib.Program(config, rule, 127)
    assert program.stages == (program,)
  long = dataclasses.replace(
    program_lib.Program(config, STATIC, 127), max_decode_length=128
  )
  assert [stage.room for stage in long.stages] == [64, 128]
  assert len(dataclasses.replace(long, native=False).stages) == 1
  with platforms.laid_out_for("tpu"):
    assert long.stages == (long,)
