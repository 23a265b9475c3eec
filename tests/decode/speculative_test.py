"""Speculative decoding: the full model's tokens, scores and caches, whatever is
drafted.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.decode import loop, speculative
from calm.decode import program as program_lib
from calm.exits import schedules
from calm.t5 import kernels
from tests import engine, reference_speculative, toys

SHORTLIST = (1, *(i for i in range(3, 40) if i % 4))
STATIC = exits.StaticExit()
RULE = exits.Speculative(2, num_drafts=5, stop_below=0.0, adapts=False)


@functools.cache
def toy(**changes) -> engine.Toy:
  """Layers 3 and 4 change little, so that drafts of layer 2 are accepted and
  refused.
  """
  sizes = toys.Config(**changes)
  params = toys.params(sizes, seed=1)
  for i in range(sizes.num_decoder_layers):
    layer = params["decoder"][f"layers_{i}"]
    for block, name in (
      ("self_attention", "out"),
      ("encoder_decoder_attention", "out"),
      ("mlp", "wo"),
    ):
      layer[block][name]["kernel"] *= 0.1 if i > 1 else 1.0
  return with_shortlist(engine.of_params(params, sizes))


def with_shortlist(made: engine.Toy, listed=SHORTLIST) -> engine.Toy:
  sizes = made.sizes.num_pieces, listed
  weights = program_lib.model_weights(
    made.params, made.config, *sizes, native=True
  )
  return dataclasses.replace(made, weights=weights)


def reference_rows(
  made: engine.Toy,
  rule,
  threshold=1.0,
  prompts=engine.PROMPTS,
  listed=SHORTLIST,
):
  shortlist = listed if rule.draft_head == "shortlist" else None
  return [
    reference_speculative.decode(
      made.reference,
      prompt,
      rule.draft_layer,
      shortlist=shortlist,
      threshold=threshold,
      max_decode_length=engine.LENGTH,
    )
    for prompt in prompts
  ]


def assert_is_the_full_model(got, full, rows):
  """Tokens, scores and caches are static-L's."""
  for i, row in enumerate(rows):
    assert min(row.gaps) >= 1e-5  # no tie
    a = got.generation
    b = full.generation
    upto = len(row.tokens)
    np.testing.assert_array_equal(a.tokens[i], b.tokens[i])
    np.testing.assert_array_equal(a.exit_layers[i], b.exit_layers[i])
    np.testing.assert_allclose(a.scores[i], b.scores[i], atol=1e-5)
    for ours, theirs in zip(
      *map(jax.tree.leaves, (got.cache, full.cache)), strict=True
    ):
      np.testing.assert_allclose(
        ours[i, :, :upto], theirs[i, :, :upto], atol=1e-5
      )


def compare_with_reference(got, rows, rule, threshold) -> None:
  """Also what was drafted, how likely it was, and how many passes it took."""
  seen = got.generation.verification
  for i, row in enumerate(rows):
    length = len(row.tokens)
    assert np.asarray(got.generation.tokens[i])[:length].tolist() == row.tokens
    np.testing.assert_allclose(
      got.generation.scores[i], sum(row.scores), rtol=1e-4
    )
    if not rule.adapts:
      drafted = np.asarray(seen.drafted[i])[:length].tolist()
      assert (seen.passes[i], drafted) == row.passes(rule, exact=threshold >= 1)
    assert not np.asarray(seen.drafted[i])[length:].any()
    refused = np.asarray(got.generation.rejected_confidences[i])[:length]
    expected = np.where(row.agrees, 0.0, row.ratios)
    if threshold < 1:
      np.testing.assert_allclose(refused, expected, atol=1e-4)
    else:
      assert np.all((np.abs(refused - expected) < 1e-4) | (refused == 0))


@pytest.mark.parametrize(
  ("rule", "rows"),
  [
    (RULE, slice(8)),
    (
      dataclasses.replace(RULE, draft_layer=1, num_drafts=9, draft_head="full"),
      slice(3),
    ),
    (exits.Speculative(3, num_drafts=2, draft_head="full"), slice(3)),
    # Of one row: passes of several read on where any of them does.
    (dataclasses.replace(RULE, num_drafts=7, stop_below=0.6), slice(2, 3)),
  ],
)
def test_it_is_the_full_model_whatever_is_drafted(rule, rows):
  made = toy()
  prompts = engine.PROMPTS[rows]
  full = engine.run(made, STATIC, prompts=prompts)
  before = engine._decode_state._cache_size()
  accepted = set()
  for threshold in (schedules.NEVER_EXIT, 1.0):
    got = engine.run(made, rule, threshold, prompts=prompts)
    expected = reference_rows(made, rule, prompts=prompts)
    assert_is_the_full_model(got, full, expected)
    compare_with_reference(got, expected, rule, threshold)
    accepted |= set(
      np.asarray(got.generation.verification.drafted).ravel().tolist()
    )
  assert accepted == {False, True}
  # One program, whatever was accepted.
  assert engine._decode_state._cache_size() == before + 1


def looked_up(seen: list[int], begun: int) -> list[int]:
  """What followed the longest run like the last `begun` ones at most, the first
  of equals.
  """
  runs: dict[int, list[list[int]]] = {}
  for at in range(len(seen) - 1):
    likes = (
      n <= at and seen[at - n] == seen[-1 - n] for n in range(min(8, begun))
    )
    run = len(list(itertools.takewhile(bool, likes)))
    runs.setdefault(run, []).append(
      list(itertools.takewhile(bool, seen[at + 1 : at + 4]))
    )
  return runs[max(runs)][0] if max(runs) else []


def test_drafts_off_the_prompt_are_what_followed_the_last_tokens():
  made = toy()
  rule = exits.Speculative(0, num_drafts=3, adapts=False)
  full = engine.run(made, STATIC).generation.tokens
  seen = set()
  np.testing.assert_array_equal(
    engine.run(made, rule, 0.3).generation.tokens, full
  )
  for prompt, tokens in zip(engine.PROMPTS, full, strict=True):
    text = [int(t) for t in tokens if t]
    accepted = []
    while (at := len(accepted)) < len(text):
      drafts = looked_up([*prompt.tolist(), *text[:at]], at)[
        : engine.LENGTH - at - 1
      ]
      right = (a == b for a, b in zip(drafts, text[at:], strict=False))
      accepted += [*itertools.takewhile(bool, right), False]
    got = engine.run(
      made, rule, 1.0, prompts=prompt[None]
    ).generation.verification
    assert got.passes.tolist() == [accepted.count(False)]
    assert got.drafted[0, : len(text)].tolist() == accepted[: len(text)]
    seen |= set(accepted)
  assert seen == {True, False}


def test_drafts_are_read_through_the_translator_and_the_full_model_is_not():
  translated = toy(exit_translators=(1, 2))
  plain = toy()
  got = engine.run(translated, RULE, 1.0)
  rows = reference_rows(translated, RULE)
  assert_is_the_full_model(got, engine.run(plain, STATIC), rows)
  compare_with_reference(got, rows, RULE, 1.0)
  # Meta: without the translator others are drafted.
  assert [row.drafts for row in rows] != [
    row.drafts for row in reference_rows(plain, RULE)
  ]


def test_slack_accepts_what_the_yardstick_accepts_and_no_slack_is_exact():
  made = toy()
  tokens = []
  for threshold in (1.0, 0.5, 0.1, 0.0):
    got = engine.run(made, RULE, threshold)
    compare_with_reference(
      got, reference_rows(made, RULE, threshold), RULE, threshold
    )
    # A text under slack does not depend on where passes end.
    adapts = engine.run(
      made, dataclasses.replace(RULE, adapts=True), threshold
    ).generation
    np.testing.assert_array_equal(adapts.tokens, got.generation.tokens)
    tokens.append(np.asarray(got.generation.tokens).tolist())
    if threshold < 1:
      confidences = np.asarray(got.generation.confidences)
      assert np.all(
        (confidences >= threshold)[np.asarray(got.generation.tokens) > 0]
      )
  assert len({str(each) for each in tokens}) > 2


def test_a_head_in_8_bits_says_what_the_one_in_float32_says():
  """Of refused drafts too."""
  rule = dataclasses.replace(RULE, draft_head="full")
  made = toy()
  threshold = 0.9
  read = program_lib.model_weights(
    made.params,
    made.config,
    made.sizes.num_pieces,
    SHORTLIST,
    head_dtype="int8",
  )
  assert not isinstance(read.decoder.head, jax.Array)
  got = engine.run(
    dataclasses.replace(made, weights=read), rule, threshold
  ).generation
  full = engine.run(made, rule, threshold).generation
  np.testing.assert_array_equal(got.tokens, full.tokens)
  np.testing.assert_array_equal(
    got.verification.drafted, full.verification.drafted
  )
  # Pieces that cannot be the likeliest stay rounded, and refused drafts are
  # among them.
  np.testing.assert_allclose(got.scores, full.scores, atol=0.1)
  for name in ("confidences", "rejected_confidences"):
    np.testing.assert_allclose(
      getattr(got, name), getattr(full, name), atol=5e-2
    )
  # drafts were refused
  assert np.any(np.asarray(full.rejected_confidences) > 0)


def test_of_equal_logits_the_first_is_emitted():
  """Every piece has a twin, and drafts are the second of two."""
  made = toy()
  listed = tuple(range(4, 39, 2))
  params = jax.tree.map(np.copy, made.params)
  head = params["decoder"]["logits_dense"]["kernel"]
  head[:, 4:39:2] = head[:, 3:38:2]
  twins = with_shortlist(engine.of_params(params, made.sizes), listed)
  got = engine.run(twins, RULE, 1.0).generation
  full = engine.run(twins, STATIC).generation
  np.testing.assert_array_equal(got.tokens, full.tokens)
  rows = reference_rows(twins, RULE, listed=listed)
  seconds = [
    ratio > 1 - 1e-6 and not agrees
    for row in rows
    for ratio, agrees in zip(row.ratios, row.agrees, strict=True)
  ]
  assert any(seconds)


def test_a_window_ends_where_its_first_draft_is_not_read_on_from(monkeypatch):
  """It drafts EOS: such a pass went on for ever."""
  prompts = engine.PROMPTS[:1]
  full = engine.run(toy(), STATIC, prompts=prompts)
  eos = jnp.ones(1, jnp.int32), jnp.ones(1)
  monkeypatch.setattr(
    speculative.Speculation, "_draft_head", lambda self, hidden: eos
  )
  got = engine.run(toy(), RULE, 1.0, prompts=prompts)
  np.testing.assert_array_equal(got.generation.tokens, full.generation.tokens)


def test_bad_drafts_are_not_made():
  """A head that drafts nonsense: after some refusals a pass is a step of the
  full model.
  """
  made = toy()
  weights = made.weights.decoder
  bad = dataclasses.replace(
    weights, shortlist=jax.tree.map(jnp.negative, weights.shortlist)
  )
  made = dataclasses.replace(
    made, weights=dataclasses.replace(made.weights, decoder=bad)
  )
  got = {}
  for adapts in (True, False):
    rule = dataclasses.replace(RULE, adapts=adapts)
    state = engine.run(made, rule, 1.0, prompts=engine.PROMPTS[:4])
    full = engine.run(made, STATIC, prompts=engine.PROMPTS[:4])
    np.testing.assert_array_equal(
      state.generation.tokens, full.generation.tokens
    )
    got[adapts] = jax.device_get(state.generation.verification)
  assert 0 < np.sum(got[True].drafts) < 0.6 * np.sum(got[False].drafts)
  assert np.sum(got[False].drafted) < 5


def test_a_pass_asks_the_full_head_once_for_all_of_its_positions():
  """Read off what is compiled: one product with the head for every size of a
  pass.
  """
  made = toy()
  rows = 4
  program = program_lib.Program(
    made.config, exits.Speculative(2, num_drafts=4), engine.LENGTH
  )
  encoded = jax.tree.map(lambda leaf: leaf[:rows], engine.encode(made))
  args = made.weights, encoded, jnp.ones(rows, bool), jnp.float32(1)
  decode = jax.jit(lambda *args: program.decode_state(*args).generation)
  columns = engine.columns(made.weights.decoder.head)
  text = decode.lower(*args).as_text()
  found = re.findall(
    rf"(?:dot_general|calm_tiles).*-> tensor<(\d+)x{columns}xf32>", text
  )
  assert sorted(map(int, found)) == [rows * size for size in (1, 5)]


def test_bad_rules_and_slacks_are_named():
  for named, options in {
    "`draft_layer` in 1 ... 3": {"draft_layer": 4},
    "`num_drafts`": {"num_drafts": 0},
    "`draft_head`": {"draft_head": "half"},
    "`stop_below`": {"stop_below": 1.5},
  }.items():
    with pytest.raises(ValueError, match=named):
      exits.Speculative(**{"draft_layer": 2, **options}).depth(4)


def test_drafts_are_worth_what_rows_and_weights_make_of_them(monkeypatch):
  """A batch of many rows, or a large head for every draft, leaves nothing to
  save.
  """
  made = toy()
  layer = exits.Speculative(1, draft_head="full")

  def cost(batch, weights=made.weights.decoder, rule=layer):
    return speculative.draft_cost(made.config, weights, rule, batch)

  monkeypatch.setattr(kernels, "is_small", lambda matrix: False)
  assert 1 / 4 < cost(1) < cost(2) < cost(64) == math.inf
  look = exits.Speculative(0, 3)  # rows find drafts at different times
  assert cost(1, rule=look) < cost(1) and cost(2, rule=look) == math.inf
  large = dataclasses.replace(
    made.weights.decoder, head=np.zeros((512, 512), np.float32)
  )
  assert cost(1, large) == math.inf
  # And a row of small layers that are not in tiles, whose products wake
  # threads.
  monkeypatch.setattr(kernels, "is_small", lambda matrix: True)
  assert cost(1) == math.inf > cost(2)


def seen(tokens: int, passes: int, drafts: int) -> loop.Generation:
  """A text of so many tokens."""
  row = np.zeros((1, 16), np.float32)
  layers = (np.arange(16) < tokens)[None] * 4
  verification = loop.Verification(
    row > 0, np.array([passes]), np.array([drafts])
  )
  return loop.Generation(layers, layers, row, row, row[:, 0], verification)


def test_the_longer_drafts_bring_nothing_the_longer_they_are_let_be():
  history = speculative.History(cost=0.3, must=False)
  paused = []
  for _ in range(6):
    while not history.drafts_next():
      paused[-1] += 1
    history.update(seen(tokens=12, passes=12, drafts=4))
    paused.append(0)
  assert paused == [1, 4, 16, 64, 64, 0]
  history.update(seen(tokens=12, passes=3, drafts=10))
  assert history.drafts_next() and history.miss_streak == 0
  # One text that loses little does not turn off what saved more before it.
  history.update(seen(tokens=12, passes=12, drafts=4))
  assert history.drafts_next() and history.saved > 0
  for cost, must in ((math.inf, False), (math.inf, True)):
    assert speculative.History(cost, must).drafts_next() == must
