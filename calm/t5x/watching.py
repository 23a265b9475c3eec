"""The exits of T5X's own sampling loop, from the pass that makes the tokens.

`decoding.temperature_sample` returns tokens and scores only, but shows its state to a
`state_callback_fn` before every step and once more after the last: with it the cache, in which
`loops.Loop` notes the exits. Other loops (beam search, somebody's own) tell nothing, and their
texts are read again by `loops.Loop.replay`. This module does not import T5X.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp

from calm.t5x import loops

CALLBACK = "state_callback_fn"


@dataclasses.dataclass
class Watch:
  """T5X's `state_callback_fn` that changes nothing, and keeps the state that it saw last.

  Attributes:
    state: while the loop is traced that of a step, afterwards the final one. A tracer: it is
      read in the function that called the loop, and a watch is of one call.
  """

  state: Any = None

  def __call__(self, state: Any) -> Any:
    self.state = state
    return state

  def exits(self, num_decodes: int) -> loops.Exits:
    """Those of the sequences in the order in which T5X returns them, by ascending score.

    Args:
      num_decodes: as the loop was told.

    Returns:
      Arrays [batch * num_decodes, length]; what a row noted after its end is still in them.
    """
    scores = self.state.log_prob.reshape(-1, num_decodes)
    order = jnp.argsort(scores, axis=-1)[..., None]

    def sorted_rows(noted: jax.Array) -> jax.Array:
      decodes = noted.reshape(*scores.shape, -1)
      return jnp.take_along_axis(decodes, order, axis=1).reshape(noted.shape)

    return loops.Exits(**jax.tree.map(sorted_rows, self.state.cache["exits"]))


def watch(
  decode_fn: Callable[..., Any], sampling: Callable[..., Any], options: Mapping[str, Any]
) -> Watch | None:
  """A watch to give to a decode function as `state_callback_fn`, if it is T5X's sampling.

  Args:
    decode_fn: the model's, as it is, in `functools.partial`, or as gin configures it.
    sampling: T5X's `decoding.temperature_sample`.
    options: what the call gives to `decode_fn`.

  Returns:
    None for another function, and where somebody has a callback there already.
  """
  taken = CALLBACK in options or f".{CALLBACK}" in gin.config_str()
  inner: Any = inspect.unwrap(decode_fn)
  while isinstance(inner, functools.partial):
    taken = taken or CALLBACK in inner.keywords
    inner = inspect.unwrap(inner.func)
  return None if taken or inner is not inspect.unwrap(sampling) else Watch()
