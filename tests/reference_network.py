"""The T5 1.1 network in plain numpy: one row and one token at a time.

The lower half of the yardstick in `reference.py`: encoder, one decoder layer,
the head. It imports neither the library nor JAX. Parameters are the nested
dictionary of T5X's T5 1.1 network with numpy leaves. The configuration is any
object with the attributes `num_heads`, `head_dim`, `num_encoder_layers`,
`num_decoder_layers`, `emb_dim`, `mlp_activations`, `logits_via_embedding` and
`vocab_size`; `relpos_buckets` (32) and `relpos_max_distance` (128) are read
where present.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PAD_ID = 0

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters with what is needed to read them.

  Attributes:
    params: T5X-shaped tree of numpy arrays.
    config: the sizes, see the module's docstring.
    num_pieces: valid vocabulary; ids from here on have logit -inf. None: all
      rows are valid.
    dtype: numpy type that everything is computed in.
    shortlist: ids of likely tokens, for measures that look at those only.
  """

  params: Tree
  config: Any
  num_pieces: int | None = None
  dtype: Any = np.float32
  shortlist: Sequence[int] = ()

  def __post_init__(self):
    object.__setattr__(self, "params", cast(self.params, self.dtype))

  def leaf(self, *path: str) -> np.ndarray:
    node: Any = self.params
    for name in path:
      node = node[name]
    return node


def cast(node: Any, dtype: Any) -> Any:
  """The same tree with leaves of another type."""
  if isinstance(node, Mapping):
    return {name: cast(child, dtype) for name, child in node.items()}
  return np.asarray(node, dtype)


def relative_bucket(
  distance: int, bidirectional: bool, num_buckets: int, limit: int
) -> int:
  """Bucket, in [0, num_buckets), of key position minus query position,
  `distance`; exact integer arithmetic in place of logarithms.

  Where `bidirectional`, half of them are for keys after the query, which else
  count as distance
  0. The first half (of each direction) are exact distances, bucket `exact + k`
  starts at exact * (limit / exact) ** (k / num_large); from `limit` on all
  share the last.
  """
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets if distance > 0 else 0
    away = abs(distance)
  else:
    away = max(-distance, 0)
  exact = num_buckets // 2
  if away < exact:
    return offset + away
  num_large = num_buckets - exact
  k = 0
  while k + 1 < num_large and (
    away**num_large * exact ** (k + 1) >= limit ** (k + 1) * exact**num_large
  ):
    k += 1
  return offset + exact + k


def position_bias(
  model: Model, side: str, query_position: int, num_keys: int
) -> np.ndarray:
  """Relative position bias of one query. [num_heads, num_keys]; `side` encoder
  or decoder.
  """
  table = model.leaf(side, "relpos_bias", "rel_embedding")
  buckets = [
    relative_bucket(
      position - query_position,
      side == "encoder",
      getattr(model.config, "relpos_buckets", 32),
      getattr(model.config, "relpos_max_distance", 128),
    )
    for position in range(num_keys)
  ]
  return table[:, buckets]


def rms_norm(model: Model, x: np.ndarray, *path: str) -> np.ndarray:
  """T5 layer norm: divides by the root mean square (epsilon 1e-6), no mean, no
  offset.
  """
  mean_square = np.mean(np.square(x), dtype=model.dtype)
  return (x / np.sqrt(mean_square + model.dtype(1e-6))) * model.leaf(
    *path, "scale"
  )


def split_heads(model: Model, x: np.ndarray) -> np.ndarray:
  return x.reshape(model.config.num_heads, model.config.head_dim)


def project(model: Model, x: np.ndarray, *path: str) -> np.ndarray:
  """One projection of one normed state. [num_heads, head_dim]."""
  return split_heads(model, x @ model.leaf(*path, "kernel"))


def attend(
  query: np.ndarray,
  keys: Sequence[np.ndarray],
  values: Sequence[np.ndarray],
  bias: np.ndarray,
) -> np.ndarray:
  """softmax(q k + bias) v for each head, no 1/sqrt(head_dim). [num_heads,
  head_dim] each, keys and values one a position; `bias` [num_heads, positions].
  """
  out = np.zeros_like(query)
  for head in range(query.shape[0]):
    logits = (
      np.array([query[head] @ key[head] for key in keys], query.dtype)
      + bias[head]
    )
    weights = np.exp(logits - logits.max())
    weights = weights / weights.sum()
    for weight, value in zip(weights, values, strict=True):
      out[head] += weight * value[head]
  return out


def activation(model: Model, name: str, x: np.ndarray) -> np.ndarray:
  if name == "linear":
    return x
  if name == "relu":
    return np.maximum(x, 0)
  if name == "gelu":
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return (0.5 * x * (1 + np.tanh(inner))).astype(model.dtype)
  raise ValueError(
    f"`mlp_activations` has {name!r}; expected linear, relu or gelu."
  )


def feed_forward(model: Model, x: np.ndarray, *path: str) -> np.ndarray:
  """The MLP on a normed state; gated where there are two activations.
  [emb_dim].
  """
  names = tuple(model.config.mlp_activations)
  hidden = np.ones((), model.dtype)
  for i, name in enumerate(names):
    kernel = "wi" if len(names) == 1 else f"wi_{i}"
    hidden = hidden * activation(
      model, name, x @ model.leaf(*path, kernel, "kernel")
    )
  return hidden @ model.leaf(*path, "wo", "kernel")


def embed(model: Model, token: int) -> np.ndarray:
  return model.leaf("token_embedder", "embedding")[token]


def encode(model: Model, prompt: Sequence[int]) -> np.ndarray:
  """Encoder states of one prompt, [len(prompt), emb_dim]; nothing attends to
  padding, 0, whose rows are zero.
  """
  real = [i for i, token in enumerate(prompt) if token != PAD_ID]
  states = {i: embed(model, int(prompt[i])) for i in real}
  for layer in range(model.config.num_encoder_layers):
    path = ("encoder", f"layers_{layer}")
    normed = {
      i: rms_norm(model, states[i], *path, "pre_attention_layer_norm")
      for i in real
    }
    keys = [project(model, normed[i], *path, "attention", "key") for i in real]
    values = [
      project(model, normed[i], *path, "attention", "value") for i in real
    ]
    for i in real:
      query = project(model, normed[i], *path, "attention", "query")
      bias = position_bias(model, "encoder", i, len(prompt))[:, real]
      mixed = attend(query, keys, values, bias)
      x = states[i] + mixed.reshape(-1) @ model.leaf(
        *path, "attention", "out", "kernel"
      )
      normed_x = rms_norm(model, x, *path, "pre_mlp_layer_norm")
      states[i] = x + feed_forward(model, normed_x, *path, "mlp")
  out = np.zeros((len(prompt), model.config.emb_dim), model.dtype)
  for i in real:
    out[i] = rms_norm(model, states[i], "encoder", "encoder_norm")
  return out


@dataclasses.dataclass
class Memory:
  """Keys and values, `[layer - 1][position]` -> [num_heads, head_dim]. Layers
  are 1-based.
  """

  keys: list[list[np.ndarray]]
  values: list[list[np.ndarray]]


def cross_memory(
  model: Model, prompt: Sequence[int], encoded: np.ndarray
) -> Memory:
  """Cross-attention keys and values of every decoder layer, real positions
  only.
  """
  real = [i for i, token in enumerate(prompt) if token != PAD_ID]
  memory = Memory([], [])
  for layer in range(model.config.num_decoder_layers):
    path = ("decoder", f"layers_{layer}", "encoder_decoder_attention")
    memory.keys.append([project(model, encoded[i], *path, "key") for i in real])
    memory.values.append(
      [project(model, encoded[i], *path, "value") for i in real]
    )
  return memory


def self_projections(
  model: Model, layer: int, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Key and value that decoder layer `layer` makes of its input `state` (raw
  residual).
  """
  path = ("decoder", f"layers_{layer - 1}")
  normed = rms_norm(model, state, *path, "pre_self_attention_layer_norm")
  attention = (*path, "self_attention")
  return project(model, normed, *attention, "key"), project(
    model, normed, *attention, "value"
  )


def decoder_layer(
  model: Model, layer: int, state: np.ndarray, memory: Memory, cross: Memory
) -> np.ndarray:
  """d^layer of the newest token from d^(layer - 1); appends its key and value
  to `memory`.
  """
  path = ("decoder", f"layers_{layer - 1}")
  key, value = self_projections(model, layer, state)
  memory.keys[layer - 1].append(key)
  memory.values[layer - 1].append(value)

  num_keys = len(memory.keys[layer - 1])
  normed = rms_norm(model, state, *path, "pre_self_attention_layer_norm")
  query = project(model, normed, *path, "self_attention", "query")
  bias = position_bias(model, "decoder", num_keys - 1, num_keys)
  mixed = attend(query, memory.keys[layer - 1], memory.values[layer - 1], bias)
  state = state + mixed.reshape(-1) @ model.leaf(
    *path, "self_attention", "out", "kernel"
  )

  path_cross = (*path, "encoder_decoder_attention")
  normed = rms_norm(model, state, *path, "pre_cross_attention_layer_norm")
  query = project(model, normed, *path_cross, "query")
  no_bias = np.zeros(
    (model.config.num_heads, len(cross.keys[layer - 1])), model.dtype
  )
  mixed = attend(query, cross.keys[layer - 1], cross.values[layer - 1], no_bias)
  state = state + mixed.reshape(-1) @ model.leaf(*path_cross, "out", "kernel")

  normed = rms_norm(model, state, *path, "pre_mlp_layer_norm")
  return state + feed_forward(model, normed, *path, "mlp")


def head_input(model: Model, layer: int, state: np.ndarray) -> np.ndarray:
  """What heads and confidences read of d^layer: x, its norm, or x + x A + b
  where the layer has a translator (A, b).
  """
  normed = rms_norm(model, state, "decoder", "decoder_norm")
  translator = (
    model.params["decoder"]
    .get("exit_translators", {})
    .get(f"layers_{layer - 1}")
  )
  if translator is None:
    return normed
  return normed + normed @ translator["kernel"] + translator["bias"]


def predicted_input(
  model: Model, layer: int, state: np.ndarray, exit_layer: int
) -> np.ndarray:
  """Input of the skipped `layer` by learned propagation: d^exit + (norm(d^exit)
  D + d) U.
  """
  path = ("decoder", "exit_propagation", f"layers_{exit_layer - 1}")
  code = rms_norm(model, state, "decoder", "decoder_norm") @ model.leaf(
    *path, "down", "kernel"
  )
  code = code + model.leaf(*path, "down", "bias")
  return (
    state + code @ model.leaf(*path, "up", "kernel")[layer - exit_layer - 1]
  )


def head_logits(model: Model, layer: int, state: np.ndarray) -> np.ndarray:
  """Logits of d^layer: shared final norm and head, -inf beyond the pieces."""
  normed = head_input(model, layer, state)
  if model.config.logits_via_embedding:
    table = model.leaf("token_embedder", "embedding")
    logits = (table @ normed) / model.dtype(math.sqrt(model.config.emb_dim))
  else:
    logits = normed @ model.leaf("decoder", "logits_dense", "kernel")
  if model.num_pieces is not None:
    logits[model.num_pieces :] = -np.inf
  return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max()
  return shifted - np.log(np.exp(shifted).sum())


def top_two_gap(values: np.ndarray) -> float:
  """Largest minus second largest; inf when only one value is finite."""
  second, first = np.sort(values)[-2:]
  return float(first - second)
