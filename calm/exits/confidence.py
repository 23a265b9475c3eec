"""Per-token confidence measures: how sure a layer is of its prediction, in [0,
1]. What a `LayerView` offers is lazy: a measure that never asks for logits
costs no vocabulary head.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from calm import arguments
from calm.exits.layers import Peaks

# Of the shortlist: log(1 + gap of the two largest logits), margin, certainty.
# Of the residual: cosine with the layer before (0 at layer 1), log of its root
# mean square.
NUM_FEATURES = 5
# The last layer agrees with itself: its sigmoid is 1 in float32.
CERTAIN = 30.0


@dataclasses.dataclass(frozen=True)
class LayerView:
  """What a measure may look at after decoder layer `layer`; logits, computed
  when asked for, are float32: full, of the shortlist, pre-sigmoid of the
  classifier and of this layer's probe.
  """

  layer: int  # 1-based
  hidden: jax.Array  # the raw residual d^i, [batch, emb_dim]
  previous: jax.Array  # d^{i-1}, the embedding at layer 1
  logits: Callable[[], jax.Array]  # [batch, vocab]
  peaks: Callable[[], Peaks]  # of these, [batch]
  exit_logit: Callable[[], jax.Array]  # [batch]
  shortlist_peaks: Callable[[], Peaks]  # [batch]
  probe_logit: Callable[[], jax.Array]  # [batch]


@runtime_checkable
class Measure(Protocol):
  """A confidence measure, and what most do not need.

  Attributes:
    name: its name on command lines and in files.
    uses_head: whether it computes the full logits, which the exit then need
      not.
    uses_shortlist: whether it asks the head about the shortlist, which a model
      must have then.
    part: of the decoder's parameters that it reads and stage two trains; None:
      none.
    bound: view -> a cheaper confidence to be cleared first, [batch]; where it
      fails, the token stays without the measure itself being asked. None: there
      is none.
  """

  name: ClassVar[str]
  uses_head: ClassVar[bool] = False
  uses_shortlist: ClassVar[bool] = False
  part: ClassVar[str | None] = None
  bound: Any = None

  def __call__(self, view: LayerView) -> jax.Array: ...


def cosine_similarity(
  hidden: Float[Array, "*batch emb"], previous: Float[Array, "*batch emb"]
) -> Float[Array, "*batch"]:
  """cos(d^i, d^{i-1}) with negative values as 0 (paper section 3.5, state
  saturation).
  """
  hidden, previous = hidden.astype(jnp.float32), previous.astype(jnp.float32)
  dot = jnp.sum(hidden * previous, axis=-1)
  squares = jnp.sum(hidden * hidden, axis=-1) * jnp.sum(
    previous * previous, axis=-1
  )
  return jnp.clip(dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-30)), 0.0, 1.0)


@struct.dataclass
class Probes:
  """Logistic regressions, one a layer below the last (Alain and Bengio, 2016):
  is its token the last layer's?
  """

  kernel: jax.Array  # of decoder_norm(d^i), [emb_dim, layers - 1]
  features: jax.Array  # of `evidence`, [NUM_FEATURES, layers - 1]
  bias: jax.Array  # [layers - 1]

  @property
  def num_layers(self) -> int:
    """Decoder layers of the model, the last included."""
    return self.bias.shape[0] + 1

  def logit(self, layer: int, normed: jax.Array, known: jax.Array) -> jax.Array:
    """Pre-sigmoid confidence of 1-based `layer` below the last, [*batch]
    float32, of decoder_norm(d^i) [*batch, emb_dim] and `evidence` [*batch,
    NUM_FEATURES].
    """
    column = layer - 1
    read = normed.astype(jnp.float32) @ self.kernel[:, column]
    return read + known @ self.features[:, column] + self.bias[column]


def logit_features(listed: Peaks) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The first of the numbers named at `NUM_FEATURES`."""
  return jnp.log1p(listed.top - listed.second), listed.margin, listed.certainty


def evidence(
  hidden: Float[Array, "*batch emb"],
  previous: Float[Array, "*batch emb"],
  listed: Peaks,
) -> Float[Array, "*batch features"]:
  """The numbers named at `NUM_FEATURES`, float32, of raw residuals d^i and
  d^{i-1} (zeros at layer 1, which has no layer before) and the logits of likely
  tokens at this layer.
  """
  square = jnp.mean(jnp.square(hidden.astype(jnp.float32)), axis=-1)
  known = (
    *logit_features(listed),
    cosine_similarity(hidden, previous),
    0.5 * jnp.log(jnp.maximum(square, 1e-30)),
  )
  return jnp.stack(known, axis=-1)


@dataclasses.dataclass(frozen=True)
class Softmax(Measure):
  """`Peaks.margin` of the full head at every allowed layer."""

  name: ClassVar[str] = "softmax"
  uses_head: ClassVar[bool] = True

  def __call__(self, view: LayerView) -> jax.Array:
    return view.peaks().margin


@dataclasses.dataclass(frozen=True)
class Shortlist(Softmax):
  """`Peaks.margin` over a short list of likely tokens first, then over the full
  head.

  If the most likely token is on the list, the list's margin is never below the
  full one (the second logit and the normaliser can only shrink): a filter
  without misses, and the exits are those of `Softmax`. If it is not, the token
  may leave later. What is emitted always comes from the full head.
  """

  name: ClassVar[str] = "shortlist"
  uses_shortlist: ClassVar[bool] = True

  def bound(self, view: LayerView) -> jax.Array:
    return view.shortlist_peaks().margin


@dataclasses.dataclass(frozen=True)
class State(Measure):
  """`cosine_similarity` of a layer's residual with the layer before; 0 at layer
  1.
  """

  name: ClassVar[str] = "state"

  def __call__(self, view: LayerView) -> jax.Array:
    # d^0 is the embedding: there is no layer before to agree with
    if view.layer == 1:
      return jnp.zeros(view.hidden.shape[:-1], jnp.float32)
    return cosine_similarity(view.hidden, view.previous)


@dataclasses.dataclass(frozen=True)
class Classifier(Measure):
  """sigmoid of the exit classifier, one linear map shared by all layers."""

  name: ClassVar[str] = "classifier"
  part: ClassVar[str | None] = "exit_classifier"

  def __call__(self, view: LayerView) -> jax.Array:
    return jax.nn.sigmoid(view.exit_logit())


@dataclasses.dataclass(frozen=True)
class Probe(Measure):
  """sigmoid of each layer's own linear probe, see `Probes`."""

  name: ClassVar[str] = "probe"
  uses_shortlist: ClassVar[bool] = True
  part: ClassVar[str | None] = "exit_probes"

  def __call__(self, view: LayerView) -> jax.Array:
    return jax.nn.sigmoid(view.probe_logit())


MEASURES: Mapping[str, Measure] = {
  m.name: m for m in (Softmax(), Shortlist(), State(), Classifier(), Probe())
}


def lacking(
  measure: Measure, parts: Collection[str], shortlist: bool
) -> str | None:
  """What a model lacks to compute a measure: a part of its parameters,
  'shortlist', or None.

  `parts` are those of the decoder's parameters that it holds.
  """
  if measure.part is not None and measure.part not in parts:
    return measure.part
  return "shortlist" if measure.uses_shortlist and not shortlist else None


@arguments.checked()
def measure(name: str) -> Measure:
  """The measure of this name; ValueError names the choices."""
  if name not in MEASURES:
    # Earlier versions had 'entropy' and 'patience', which their files may name.
    raise ValueError(
      f"Expected `measure` to be one of {sorted(MEASURES)}, got {name!r}; "
      "calibrate with one of"
      " these."
    )
  return MEASURES[name]
