"""What the layers above an exit store for that token (paper section 3.2 and 3.3.1).

Nothing is written here: each of `calm.decode.engines` writes it when it likes, `Deferred`, the
usual one, when a later token first needs the layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax

from calm.exits.layers import KeyValue, Layers, select_rows


@runtime_checkable
class Propagation(Protocol):
  """What the layers above an exit store for that token.

  `exact_when_run` tells that running a layer on the frozen exit state already yields the
  keys and values that `skipped` would; `projects_state` that skipped layers project one state,
  which can wait until a layer is needed.
  """

  name: ClassVar[str]
  exact_when_run: ClassVar[bool]
  projects_state: ClassVar[bool]

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
  projects_state: ClassVar[bool] = True

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
  projects_state: ClassVar[bool] = True

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
  projects_state: ClassVar[bool] = False

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
      f"Expected `propagation` to be one of {sorted(PROPAGATIONS)}, got {name!r}."
    )
  return PROPAGATIONS[name]
