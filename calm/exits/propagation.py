"""What the layers above an exit store for that token (paper section 3.2 and 3.3.1).

Knows no network: `Layers` is what a decoder offers at one position, as callables.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KeyValue:
  """One position's self-attention key and value at one layer, [batch, heads, head_dim]."""

  key: jax.Array
  value: jax.Array


def no_shortlist(hidden: jax.Array) -> jax.Array:
  """What a model without a shortlist says when it is asked for one."""
  del hidden
  raise ValueError(
    "Expected a shortlist of likely tokens for the measure 'shortlist'. Got a model without;"
    " give `shortlist` (token ids), or use the measure 'softmax'."
  )


@dataclasses.dataclass(frozen=True)
class Layers:
  """What exits need of a decoder at one position; layers are 1-based.

  Attributes:
    num_layers: L.
    run: (i, d^{i-1}) -> (d^i, this position's `KeyValue` at layer i).
    project: (i, d) -> `KeyValue` that layer i makes of input state d.
    logits: (i, d^i) -> float32 logits [batch, vocab] of layer i's full head.
    exit_logit: d^i -> pre-sigmoid exit confidence [batch].
    shared_head: whether `logits` is one and the same head for every layer.
    shortlist_logits: d^i -> float32 logits [batch, shortlist] of likely tokens only.
  """

  num_layers: int
  run: Callable[[int, jax.Array], tuple[jax.Array, KeyValue]]
  project: Callable[[int, jax.Array], KeyValue]
  logits: Callable[[int, jax.Array], jax.Array]
  exit_logit: Callable[[jax.Array], jax.Array]
  shared_head: bool = True
  shortlist_logits: Callable[[jax.Array], jax.Array] = no_shortlist


@runtime_checkable
class Propagation(Protocol):
  """What the layers above an exit store for that token.

  `exact_when_run` tells that running a layer on the frozen exit state already yields the
  keys and values that `skipped` would.
  """

  name: ClassVar[str]
  exact_when_run: ClassVar[bool]

  def remember(self, memory: Any, layer: int, hidden: jax.Array, row: KeyValue, done) -> Any:
    """Updates the strategy's memory after `layer`; `done` rows had left before it."""
    ...

  def skipped(self, layer: int, hidden: jax.Array, memory: Any, layers: Layers) -> KeyValue:
    """Keys and values of a skipped layer, for rows that left with state `hidden`."""
    ...

  def projected(self, hidden: jax.Array, memory: Any) -> jax.Array | None:
    """The state that every skipped layer projects, [batch, emb_dim]; None if none does."""
    ...


@dataclasses.dataclass(frozen=True)
class ExitState:
  """The paper's: each skipped layer projects the exit hidden state d^j itself."""

  name: ClassVar[str] = "exit_state"
  exact_when_run: ClassVar[bool] = True

  def remember(self, memory, layer, hidden, row, done):
    return None

  def skipped(self, layer, hidden, memory, layers):
    return layers.project(layer, hidden)

  def projected(self, hidden, memory):
    return hidden


@dataclasses.dataclass(frozen=True)
class FirstState:
  """Section 3.3.1's variant: d^1 instead of d^j goes to the skipped layers."""

  name: ClassVar[str] = "first_state"
  exact_when_run: ClassVar[bool] = False

  def remember(self, memory, layer, hidden, row, done):
    return hidden if layer == 1 else memory

  def skipped(self, layer, hidden, memory, layers):
    return layers.project(layer, memory)

  def projected(self, hidden, memory):
    return memory


@dataclasses.dataclass(frozen=True)
class CopyProjections:
  """Section 3.3.1's ablation: the exit layer's own K^j, V^j are copied upward (it fails)."""

  name: ClassVar[str] = "copy_projections"
  exact_when_run: ClassVar[bool] = False

  def remember(self, memory, layer, hidden, row, done):
    return row if memory is None else select_rows(done, memory, row)

  def skipped(self, layer, hidden, memory, layers):
    return memory

  def projected(self, hidden, memory):
    return None


PROPAGATIONS: Mapping[str, Propagation] = {
  p.name: p for p in (ExitState(), FirstState(), CopyProjections())
}


def propagation(name: str) -> Propagation:
  """The propagation of this name; ValueError names the choices."""
  if name not in PROPAGATIONS:
    raise ValueError(
      f"Expected `propagation` to be one of {sorted(PROPAGATIONS)}. Got {name!r}."
    )
  return PROPAGATIONS[name]


def select_rows(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
  """`jnp.where` over the leading row axis of every leaf."""

  def pick(a, b):
    return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(pick, if_true, if_false)
