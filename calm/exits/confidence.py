"""Per-token confidence measures: how sure a layer is of its prediction, in [0, 1].

A measure is a small frozen class that reads a `LayerView`. What the view offers beyond the
residuals is lazy: a measure that never asks for logits costs no vocabulary head.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _no_shortlist() -> jax.Array:
  raise ValueError("Expected a view with `shortlist_logits`, got none.")


@dataclasses.dataclass(frozen=True)
class LayerView:
  """What a measure may look at after decoder layer `layer`.

  Attributes:
    layer: 1-based decoder layer.
    hidden: the raw residual d^i, [batch, emb_dim].
    previous: the raw residual d^{i-1} (the embedding at layer 1), [batch, emb_dim].
    logits: () -> float32 logits of the full head at this layer, [batch, vocab].
    exit_logit: () -> pre-sigmoid output of the exit classifier, [batch].
    shortlist_logits: () -> float32 logits of the shortlist only, [batch, shortlist].
  """

  layer: int
  hidden: jax.Array
  previous: jax.Array
  logits: Callable[[], jax.Array]
  exit_logit: Callable[[], jax.Array]
  shortlist_logits: Callable[[], jax.Array] = _no_shortlist


@runtime_checkable
class Measure(Protocol):
  """A confidence measure.

  Attributes:
    name: its name on command lines and in files.
    uses_head: whether it computes the full logits, which the exit then need not.
    bound: view -> a cheaper confidence to be cleared first, [batch]; where it fails, the
      token stays without the measure itself being asked. None: there is none.
  """

  name: ClassVar[str]
  uses_head: ClassVar[bool]

  @property
  def bound(self) -> Callable[[LayerView], jax.Array] | None: ...

  def __call__(self, view: LayerView) -> jax.Array: ...


def softmax_margin(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
  """p1 - p2, the gap of the two largest softmax probabilities (paper section 3.5).

  Exactly 1.0 in float32 once the logit gap passes about 17: a threshold of 1 is not "never".
  """
  logits = logits.astype(jnp.float32)
  top = jnp.max(logits, axis=-1, keepdims=True)
  # No argmax: on a CPU it costs as much as all the other reductions together.
  second = jnp.max(jnp.where(logits < top, logits, -jnp.inf), axis=-1, keepdims=True)
  is_tied = jnp.sum((logits == top).astype(jnp.int32), axis=-1) > 1
  total = jnp.sum(jnp.exp(logits - top), axis=-1)
  return jnp.where(is_tied, 0.0, (1.0 - jnp.exp(second - top)[..., 0]) / total)


def cosine_similarity(
  hidden: Float[Array, "*batch emb"], previous: Float[Array, "*batch emb"]
) -> Float[Array, "*batch"]:
  """cos(d^i, d^{i-1}) with negative values as 0 (paper section 3.5, state saturation)."""
  hidden, previous = hidden.astype(jnp.float32), previous.astype(jnp.float32)
  dot = jnp.sum(hidden * previous, axis=-1)
  squares = jnp.sum(hidden * hidden, axis=-1) * jnp.sum(previous * previous, axis=-1)
  return jnp.clip(dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-30)), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Softmax:
  """`softmax_margin` of the full head at every allowed layer."""

  name: ClassVar[str] = "softmax"
  uses_head: ClassVar[bool] = True
  bound = None

  def __call__(self, view: LayerView) -> jax.Array:
    return softmax_margin(view.logits())


@dataclasses.dataclass(frozen=True)
class Shortlist:
  """`softmax_margin` over a short list of likely tokens first, then over the full head.

  If the most likely token is on the list, the list's margin is never below the full one (the
  second logit and the normaliser can only shrink): a filter without misses, and the exits are
  those of `Softmax`. If it is not, the token may leave later. What is emitted always comes
  from the full head.
  """

  name: ClassVar[str] = "shortlist"
  uses_head: ClassVar[bool] = True

  def __call__(self, view: LayerView) -> jax.Array:
    return softmax_margin(view.logits())

  def bound(self, view: LayerView) -> jax.Array:
    return softmax_margin(view.shortlist_logits())


@dataclasses.dataclass(frozen=True)
class State:
  """`cosine_similarity` of a layer's residual with the layer before; 0 at layer 1."""

  name: ClassVar[str] = "state"
  uses_head: ClassVar[bool] = False
  bound = None

  def __call__(self, view: LayerView) -> jax.Array:
    if view.layer == 1:  # d^0 is the embedding: there is no layer before to agree with
      return jnp.zeros(view.hidden.shape[:-1], jnp.float32)
    return cosine_similarity(view.hidden, view.previous)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """sigmoid of the exit classifier, one linear map shared by all layers."""

  name: ClassVar[str] = "classifier"
  uses_head: ClassVar[bool] = False
  bound = None

  def __call__(self, view: LayerView) -> jax.Array:
    return jax.nn.sigmoid(view.exit_logit())


MEASURES: Mapping[str, Measure] = {
  m.name: m for m in (Softmax(), Shortlist(), State(), Classifier())
}


def measure(name: str) -> Measure:
  """The measure of this name; ValueError names the choices."""
  if name not in MEASURES:
    raise ValueError(f"Expected `measure` to be one of {sorted(MEASURES)}, got {name!r}.")
  return MEASURES[name]
