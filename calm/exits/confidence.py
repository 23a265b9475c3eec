"""Per-token confidence measures: how sure a layer is of its prediction, in [0, 1]. What a
`LayerView` offers is lazy: a measure that never asks for logits costs no vocabulary head."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from calm import arguments

# Of the shortlist: log(1 + gap of the two largest logits), margin, certainty. Of the residual:
# cosine with the layer before (0 at layer 1), log of its root mean square.
NUM_FEATURES = 5
# The last layer agrees with itself: its sigmoid is 1 in float32.
CERTAIN = 30.0


@dataclasses.dataclass(frozen=True)
class LayerView:
  """What a measure may look at after decoder layer `layer`; logits, computed when asked for,
  are float32: full, of the shortlist, pre-sigmoid of the classifier and of this layer's
  probe."""

  layer: int  # 1-based
  hidden: jax.Array  # the raw residual d^i, [batch, emb_dim]
  previous: jax.Array  # d^{i-1}, the embedding at layer 1
  logits: Callable[[], jax.Array]  # [batch, vocab]
  exit_logit: Callable[[], jax.Array]  # [batch]
  shortlist_logits: Callable[[], jax.Array]  # [batch, shortlist]
  probe_logit: Callable[[], jax.Array]  # [batch]


@runtime_checkable
class Measure(Protocol):
  """A confidence measure, and what most do not need.

  Attributes:
    name: its name on command lines and in files.
    uses_head: whether it computes the full logits, which the exit then need not.
    uses_shortlist: whether it asks the head about the shortlist, which a model must have then.
    part: of the decoder's parameters that it reads and stage two trains; None: none.
    bound: view -> a cheaper confidence to be cleared first, [batch]; where it fails, the
      token stays without the measure itself being asked. None: there is none.
  """

  name: ClassVar[str]
  uses_head: ClassVar[bool] = False
  uses_shortlist: ClassVar[bool] = False
  part: ClassVar[str | None] = None
  bound: Any = None

  def __call__(self, view: LayerView) -> jax.Array: ...


def softmax_margin(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
  """p1 - p2, the gap of the two largest softmax probabilities (paper section 3.5).

  Exactly 1.0 in float32 once the logit gap passes about 17: a threshold of 1 is not "never".
  """
  logits = logits.astype(jnp.float32)
  top, second = top_two(logits)
  total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
  return (1.0 - jnp.exp(second - top)) / total


def top_two(
  logits: Float[Array, "*batch vocab"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
  """The two largest logits, the same twice where they are tied."""
  top = jnp.max(logits, axis=-1, keepdims=True)
  # No argmax: on a CPU it costs as much as all the other reductions together.
  below = jnp.max(jnp.where(logits < top, logits, -jnp.inf), axis=-1)
  is_tied = jnp.sum((logits == top).astype(jnp.int32), axis=-1) > 1
  return top[..., 0], jnp.where(is_tied, top[..., 0], below)


def certainty(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
  """1 - H(p) / log n: the entropy of the softmax over n logits, 0 of a uniform one.

  Logits of minus infinity are none of the n.
  """
  logits = logits.astype(jnp.float32)
  below = logits - jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(below)
  total = jnp.sum(weights, axis=-1)
  # 0 log 0 = 0, where the product would be NaN.
  mean = jnp.sum(weights * jnp.maximum(below, -1e4), axis=-1) / total
  most = jnp.log(jnp.sum((below > -jnp.inf).astype(jnp.float32), axis=-1))
  return jnp.clip(1.0 - (jnp.log(total) - mean) / jnp.maximum(most, 1e-6), 0.0, 1.0)


def cosine_similarity(
  hidden: Float[Array, "*batch emb"], previous: Float[Array, "*batch emb"]
) -> Float[Array, "*batch"]:
  """cos(d^i, d^{i-1}) with negative values as 0 (paper section 3.5, state saturation)."""
  hidden, previous = hidden.astype(jnp.float32), previous.astype(jnp.float32)
  dot = jnp.sum(hidden * previous, axis=-1)
  squares = jnp.sum(hidden * hidden, axis=-1) * jnp.sum(previous * previous, axis=-1)
  return jnp.clip(dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-30)), 0.0, 1.0)


@struct.dataclass
class Probes:
  """Logistic regressions, one a layer below the last (Alain and Bengio, 2016): is its token the
  last layer's?"""

  kernel: jax.Array  # of decoder_norm(d^i), [emb_dim, layers - 1]
  features: jax.Array  # of `evidence`, [NUM_FEATURES, layers - 1]
  bias: jax.Array  # [layers - 1]

  @property
  def num_layers(self) -> int:
    """Decoder layers of the model, the last included."""
    return self.bias.shape[0] + 1

  def logit(self, layer: int, normed: jax.Array, known: jax.Array) -> jax.Array:
    """Pre-sigmoid confidence of 1-based `layer` below the last, [*batch] float32, of
    decoder_norm(d^i) [*batch, emb_dim] and `evidence` [*batch, NUM_FEATURES]."""
    column = layer - 1
    read = normed.astype(jnp.float32) @ self.kernel[:, column]
    return read + known @ self.features[:, column] + self.bias[column]


def evidence(
  hidden: Float[Array, "*batch emb"],
  previous: Float[Array, "*batch emb"],
  shortlist_logits: Float[Array, "*batch shortlist"],
) -> Float[Array, "*batch features"]:
  """The numbers named at `NUM_FEATURES`, float32, of raw residuals d^i and d^{i-1} (zeros at
  layer 1, which has no layer before) and float32 logits of likely tokens at this layer."""
  top, second = top_two(shortlist_logits)
  square = jnp.mean(jnp.square(hidden.astype(jnp.float32)), axis=-1)
  known = (
    jnp.log1p(top - second),
    softmax_margin(shortlist_logits),
    certainty(shortlist_logits),
    cosine_similarity(hidden, previous),
    0.5 * jnp.log(jnp.maximum(square, 1e-30)),
  )
  return jnp.stack(known, axis=-1)


@dataclasses.dataclass(frozen=True)
class Softmax(Measure):
  """`softmax_margin` of the full head at every allowed layer."""

  name: ClassVar[str] = "softmax"
  uses_head: ClassVar[bool] = True

  def __call__(self, view: LayerView) -> jax.Array:
    return softmax_margin(view.logits())


@dataclasses.dataclass(frozen=True)
class Shortlist(Softmax):
  """`softmax_margin` over a short list of likely tokens first, then over the full head.

  If the most likely token is on the list, the list's margin is never below the full one (the
  second logit and the normaliser can only shrink): a filter without misses, and the exits are
  those of `Softmax`. If it is not, the token may leave later. What is emitted always comes
  from the full head.
  """

  name: ClassVar[str] = "shortlist"
  uses_shortlist: ClassVar[bool] = True

  def bound(self, view: LayerView) -> jax.Array:
    return softmax_margin(view.shortlist_logits())


@dataclasses.dataclass(frozen=True)
class State(Measure):
  """`cosine_similarity` of a layer's residual with the layer before; 0 at layer 1."""

  name: ClassVar[str] = "state"

  def __call__(self, view: LayerView) -> jax.Array:
    if view.layer == 1:  # d^0 is the embedding: there is no layer before to agree with
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


def lacking(measure: Measure, parts: Collection[str], shortlist: bool) -> str | None:
  """What a model lacks to compute a measure: a part of its parameters, 'shortlist', or None.

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
      f"Expected `measure` to be one of {sorted(MEASURES)}, got {name!r}; calibrate with one of"
      " these."
    )
  return MEASURES[name]
