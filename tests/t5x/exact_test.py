"""Exact decoding inside T5X: the full model's own tokens, a forced prefix in passes too."""

import jax.numpy as jnp
import numpy as np
import pytest

from calm import exits
from calm.t5x import loops
from tests import engine
from tests.t5x import models_test, setup

models = setup.import_models()
pytestmark = setup.MARKS


@pytest.mark.parametrize("prompt_with_targets", [False, True])
@pytest.mark.parametrize("adapts", [False, True])
def test_exact_decoding_is_full_depth_in_t5x_and_needs_greedy_decode(
  prompt_with_targets, adapts
):
  """Drafts of all eight rows; as their plan adapts, none, and what is not given in steps."""
  toy, batch = engine.toy(), setup.batch()
  given = np.zeros((len(engine.PROMPTS), engine.LENGTH), np.int32)
  given[::2, 1:3] = [7, 9]
  batch = {**batch, "decoder_input_tokens": jnp.asarray(given)}
  exact = exits.Speculative(3, 3, draft_head="full", adapts=adapts)
  ask = lambda rule, **more: models_test.predictor(
    setup.model(toy, rule=rule, **more), prompt_with_targets=prompt_with_targets
  )(setup.params(toy), batch, {})
  tokens, aux = ask(exact, decode_fn=loops.greedy_decode)
  expected, full = ask(exits.StaticExit(), decode_fn=loops.greedy_decode)
  np.testing.assert_array_equal(tokens, expected)
  models_test.assert_close(aux["scores"], full["scores"])
  np.testing.assert_array_equal(aux["exit_layers"], full["exit_layers"])
  if not prompt_with_targets:
    theirs, _ = ask(exits.StaticExit(), decode_fn=models_test.greedy())
    np.testing.assert_array_equal(tokens, theirs)
    with pytest.raises(ValueError, match="greedy_decode"):
      ask(exact, decode_fn=models_test.greedy())
