"""What a layer's probe reads: its normed state, and a few numbers that are at hand with it. A
probe is one layer's own logistic regression (Alain and Bengio, 2016)."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from calm.exits import confidence

# Of the shortlist: log(1 + gap of the two largest logits), margin, certainty. Of the residual:
# cosine with the layer before (0 at layer 1), log of its root mean square.
NUM_FEATURES = 5
# The last layer agrees with itself: its sigmoid is 1 in float32.
CERTAIN = 30.0


@struct.dataclass
class Probes:
  """Logistic regressions, one a layer below the last: is its token the last layer's?"""

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
  top, second = confidence.top_two(shortlist_logits)
  square = jnp.mean(jnp.square(hidden.astype(jnp.float32)), axis=-1)
  known = (
    jnp.log1p(top - second),
    confidence.softmax_margin(shortlist_logits),
    confidence.certainty(shortlist_logits),
    confidence.cosine_similarity(hidden, previous),
    0.5 * jnp.log(jnp.maximum(square, 1e-30)),
  )
  return jnp.stack(known, axis=-1)
