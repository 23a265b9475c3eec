"""The decode loop on scripted steps: no network, every number by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from calm import exits
from calm.decode import loop

VOCAB = 6
EOS = 1
SCRIPT = np.array([[4, 2, 1, 3], [5, 5, 5, 5], [1, 3, 3, 3]])
LAYERS = np.array([[2, 1, 3, 9], [1, 1, 1, 2], [3, 9, 9, 9]])


def scripted(script=SCRIPT, layers=LAYERS, gap=3.0):
  """A step that emits a script; its cache records what it was fed."""

  def step(current, position, active, cache):
    logits = gap * jax.nn.one_hot(jnp.asarray(script)[:, position], VOCAB)
    exit_layer = jnp.where(active, jnp.asarray(layers)[:, position], 0)
    confidence = jnp.where(active, exit_layer / 10, 0.0)
    token_exit = exits.TokenExit(logits, exit_layer, confidence, confidence / 2, ())
    return token_exit, cache.at[:, position].set(current)

  return step


def decode(step=None, *, active=(True, True, True), length=4, **options):
  cache = jnp.full((len(active), length), -1, jnp.int32)
  return loop.decode(
    step or scripted(),
    cache,
    active=jnp.array(active),
    max_decode_length=length,
    eos_id=EOS,
    **options,
  )


@functools.cache
def decoded() -> loop.DecodingState:
  """The script as it stands; tests only read it."""
  return decode()


def test_rows_end_at_eos_or_at_the_limit_and_are_empty_after():
  got = decoded().generation
  assert got.tokens.tolist() == [[4, 2, 1, 0], [5, 5, 5, 5], [1, 0, 0, 0]]
  assert got.exit_layers.tolist() == [[2, 1, 3, 0], [1, 1, 1, 2], [3, 0, 0, 0]]
  np.testing.assert_allclose(got.confidences, got.exit_layers / 10, rtol=1e-6)
  np.testing.assert_allclose(got.rejected_confidences, got.exit_layers / 20, rtol=1e-6)
  assert got.num_tokens.tolist() == [3, 4, 1]


def test_each_step_reads_the_token_before_and_the_first_reads_zero():
  fed = decoded().cache
  assert fed[0, :3].tolist() == [0, 4, 2]
  assert fed[1].tolist() == [0, 5, 5, 5]


def test_inactive_rows_stay_empty_and_do_not_hold_up_the_loop():
  state = decode(active=(True, False, True))
  alone = decoded().generation
  got = state.generation
  for field in ("tokens", "exit_layers", "confidences", "rejected_confidences", "scores"):
    assert not np.any(getattr(got, field)[1])
    np.testing.assert_array_equal(getattr(got, field)[0], getattr(alone, field)[0])
  # Row 1 would have run to the limit; the others are done after three tokens.
  assert state.position == 3 and not state.active.any()
  assert decode(active=(False, False, False)).position == 0
