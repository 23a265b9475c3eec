"""What the layers above an exit store for that token (paper section 3.2 and
3.3.1). Nothing is written here: engines write it, `Deferred` when a later token
first needs the layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from calm import arguments
from calm.exits.layers import KeyValue, Layers, select_rows


@runtime_checkable
class Propagation(Protocol):
  """What the layers above an exit store for that token; as `ExitState` does
  where not said. `projects_state` tells that each skipped layer projects keys
  and values from `layer_input` of one `state` of the token, which can wait
  until a layer is needed.
  """

  name: ClassVar[str]
  projects_state: ClassVar[bool] = True

  def remember(
    self,
    memory: Any,
    layer: int,
    hidden: jax.Array,
    row: KeyValue,
    done,
    layers: Layers,
  ) -> Any:
    """Updates the strategy's memory after `layer`; `done` rows had left before
    it.
    """
    return None

  def state(self, hidden: jax.Array, memory: Any) -> jax.Array:
    """What is kept of a token that left with state `hidden`, [batch, width]."""
    return hidden

  def layer_input(
    self, layer: int, state: jax.Array, layers: Layers
  ) -> jax.Array:
    """The input of the skipped `layer`, [batch, emb_dim], of a kept state."""
    return state

  def skipped(
    self, layer: int, hidden: jax.Array, memory: Any, layers: Layers
  ) -> KeyValue:
    """Keys and values of a skipped layer, for rows that left with state
    `hidden`.
    """
    return layers.project(
      layer, self.layer_input(layer, self.state(hidden, memory), layers)
    )


@dataclasses.dataclass(frozen=True)
class ExitState(Propagation):
  """The paper's: each skipped layer projects the exit hidden state d^j
  itself.
  """

  name: ClassVar[str] = "exit_state"


@dataclasses.dataclass(frozen=True)
class FirstState(Propagation):
  """Section 3.3.1's variant: d^1 instead of d^j goes to the skipped layers."""

  name: ClassVar[str] = "first_state"

  def remember(self, memory, layer, hidden, row, done, layers):
    return hidden if layer == 1 else memory

  def state(self, hidden, memory):
    return memory


@dataclasses.dataclass(frozen=True)
class Learned(Propagation):
  """A linear prediction of each skipped layer's input, fitted to states of full
  depth.

  Layer k projects d^j + P_jk [x; 1], x = decoder_norm(d^j), where d^j is the
  exit state. P_jk is of low rank: the code [x; 1] D_j of a token is computed
  once, where it may leave, and kept beside d^j; layer k adds the code times
  U_jk.
  """

  name: ClassVar[str] = "learned"

  def remember(self, memory, layer, hidden, row, done, layers):
    code = layers.code(layer, hidden)
    return code if memory is None else select_rows(done, memory, code)

  def state(self, hidden, memory):
    return jnp.concatenate([hidden, memory], axis=-1)

  def layer_input(self, layer, state, layers):
    return layers.predict(layer, state)


@dataclasses.dataclass(frozen=True)
class CopyProjections(Propagation):
  """Section 3.3.1's ablation: the exit layer's own K^j, V^j are copied upward
  (it fails).
  """

  name: ClassVar[str] = "copy_projections"
  projects_state: ClassVar[bool] = False

  def remember(self, memory, layer, hidden, row, done, layers):
    return row if memory is None else select_rows(done, memory, row)

  def skipped(self, layer, hidden, memory, layers):
    return memory


PROPAGATIONS: Mapping[str, Propagation] = {
  p.name: p for p in (ExitState(), FirstState(), Learned(), CopyProjections())
}


@arguments.checked()
def propagation(name: str) -> Propagation:
  """The propagation of this name; ValueError names the choices."""
  return PROPAGATIONS[arguments.one_of("propagation", name, PROPAGATIONS)]
