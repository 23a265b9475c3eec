"""The configuration of a T5 network, and the bounds of its fields.

Our own `config.json`, Hugging Face's, the shapes of a T5X checkpoint and gin files all become
a `T5Config`, whose fields are held against this one table. The bounds lie far beyond any T5
that was published (T5-11B: emb_dim 1024, mlp_dim 65536, 24 layers, 128 heads).
"""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

SIZES: Mapping[str, tuple[int, int]] = {
  "vocab_size": (1, 2**24),
  "emb_dim": (1, 2**16),
  "num_heads": (1, 2**12),
  "num_encoder_layers": (1, 256),
  "num_decoder_layers": (1, 256),
  "head_dim": (1, 2**14),
  "mlp_dim": (1, 2**20),
  # Half of them for each direction, half of those for exact distances: less leaves none.
  "relpos_buckets": (4, 2**12),
  "relpos_max_distance": (3, 2**20),
}
# Exit layers that have linear maps of their own.
EXIT_LAYERS = ("exit_translators", "exit_propagation")
ACTIVATIONS = (
  *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh"),
  *("leaky_relu", "linear", "log_sigmoid", "relu", "relu6", "selu", "sigmoid", "silu"),
  *("soft_sign", "softplus", "swish", "tanh"),
)
# The bias of masked attention (`layers.MASK_BIAS`) is -inf in float16, and a row with nothing
# to attend to NaN.
DTYPES = ("float32", "bfloat16")
# Numbers of a model in all: a quarter of a terabyte in float32.
_MOST_PARAMETERS = 2**36
_DAMAGED = "it is damaged, or of something else than a T5"
# Tokens of a prompt or of a text; attention over more would not fit any machine.
LONGEST = 2**16


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and choices of one model; static, so that changing any recompiles.

  Attributes:
    vocab_size: rows of the embedding (may exceed the pieces of the vocabulary).
    dtype: activation dtype; parameters, logits and confidences are float32.
    emb_dim: width of the residual stream.
    num_heads, head_dim: attention heads and the size of each.
    num_encoder_layers, num_decoder_layers: layers of either stack.
    mlp_dim: hidden units of a feed-forward block.
    dropout_rate: in [0, 1), in training only.
    float32_attention_logits: attention scores in float32 whatever `dtype`.
    relpos_buckets, relpos_max_distance: relative-position buckets, and the distance from which
      on all positions share the last one.
    mlp_activations: ('gelu', 'linear') is T5 1.1's gated GELU, ('relu',) is T5 1.0.
    logits_via_embedding: tie the output head to the embedding (T5 1.0).
    one_hot_embedding: embed by a one-hot product (partitioned training) or by a gather.
    exit_classifier: whether the tree holds the early-exit classifier (emb_dim + 1 numbers).
    exit_probes: whether it holds every layer's own exit probe (see `evidence.Probes`).
    exit_translators: 1-based layers below the last whose states heads read through a linear map
      of the layer's own: x + x A_i + b_i, x = decoder_norm(d^i).
    exit_propagation: 1-based layers below the last from which the inputs of skipped layers are
      predicted by a linear map (see `propagation.Learned`).
    exit_propagation_rank: rank of these maps, 0 without them.
    relpos_per_layer: relative-position biases of every layer's own (umT5, Pile-T5, T5X's
      scalable T5) instead of one embedding for all layers of a side.
  """

  vocab_size: int
  dtype: Any = "float32"
  emb_dim: int = 512
  num_heads: int = 8
  num_encoder_layers: int = 6
  num_decoder_layers: int = 6
  head_dim: int = 64
  mlp_dim: int = 2048
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  float32_attention_logits: bool = False
  one_hot_embedding: bool = True
  exit_classifier: bool = True
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  relpos_per_layer: bool = False
  exit_probes: bool = False
  exit_translators: Sequence[int] = ()
  exit_propagation: Sequence[int] = ()
  exit_propagation_rank: int = 0

  def __post_init__(self):
    # Gin gives lists and dtypes by name or object; a hashable static wants one form.
    for name, value in check(dataclasses.asdict(self)).items():
      object.__setattr__(self, name, value)
    for name in EXIT_LAYERS:
      if max(getattr(self, name), default=0) >= self.num_decoder_layers:
        raise ValueError(
          f"Expected `{name}` to be layers below the last of {self.num_decoder_layers} decoder"
          f" layers, got {list(getattr(self, name))}; leave the last out, whose head reads its"
          " own states."
        )
    if bool(self.exit_propagation) != bool(self.exit_propagation_rank):
      raise ValueError(
        "Expected `exit_propagation` with `exit_propagation_rank`, got the layers"
        f" {list(self.exit_propagation)} and the rank {self.exit_propagation_rank}; give both,"
        " or neither."
      )


def whole(name: str, value: Any, least: int, most: int, way_out: str = _DAMAGED) -> int:
  """A whole number in bounds.

  Raises:
    ValueError: another type, or out of bounds.
  """
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(
      f"Expected `{name}` to be a whole number, got {value!r:.60} ({type(value).__name__});"
      " write it without quotes or fraction."
    )
  if not least <= int(value) <= most:
    raise ValueError(
      f"Expected `{name}` to be in {least} ... {most}, got {value!r:.60}; {way_out}."
    )
  return int(value)


def _rate(value: Any) -> float | None:
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return float(value) if real and 0 <= float(value) < 1 else None


def _flag(value: Any) -> bool | None:
  return bool(value) if type(value).__name__ in ("bool", "bool_") else None


def _activations(value: Any) -> tuple[str, ...] | None:
  listed = isinstance(value, list | tuple) and 1 <= len(value) <= 4
  known = listed and all(isinstance(word, str) and word in ACTIVATIONS for word in value)
  return tuple(value) if known else None


def _dtype(value: Any) -> str | None:
  try:
    found = jnp.dtype(value).name
  except (TypeError, ValueError):
    return None
  return found if found in DTYPES and value is not None else None


def _layers(value: Any) -> tuple[int, ...] | None:
  most = SIZES["num_decoder_layers"][1]
  whole = lambda each: isinstance(each, numbers.Integral) and not isinstance(each, bool)
  listed = isinstance(value, list | tuple) and all(whole(n) and 1 <= n <= most for n in value)
  return tuple(map(int, value)) if listed and list(value) == sorted(set(value)) else None


# What makes a field's one form of a value, or None; what it should be; the way out.
_Field = tuple[Callable[[Any], Any], str, str]
_LAYERS: _Field = (
  *(_layers, "a list of decoder layers, ascending from 1"),
  f"give each once, of at most {SIZES['num_decoder_layers'][1]}",
)
_FLAG: _Field = (_flag, "true or false", "write one")
_FIELDS: Mapping[str, _Field] = {
  "dropout_rate": (_rate, "a number in [0, 1)", "T5 trains with 0.1"),
  "mlp_activations": (
    *(_activations, f"a list of one to four of {', '.join(ACTIVATIONS)}"),
    "T5 1.1 has ['gelu', 'linear'], T5 1.0 has ['relu']",
  ),
  "dtype": (
    *(_dtype, f"the type of activations, one of {', '.join(DTYPES)}"),
    "take 'float32', or 'bfloat16' for less memory",
  ),
  **dict.fromkeys(EXIT_LAYERS, _LAYERS),
  **dict.fromkeys(
    (
      *("logits_via_embedding", "float32_attention_logits", "one_hot_embedding"),
      *("exit_classifier", "relpos_per_layer", "exit_probes"),
    ),
    _FLAG,
  ),
}


def check(fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
  """Fields of a `T5Config` in their one form; those that are not given are not looked at.

  Args:
    fields: by their names in `T5Config`.
    names: what the file calls them, for messages.

  Raises:
    ValueError: the first field that is of another type or out of its bounds.
  """
  called = {name: name for name in fields} | dict(names or {})
  # More than `emb_dim` of a rank says nothing more.
  bounds, made = {**SIZES, "exit_propagation_rank": (0, 2**16)}, {}
  for field, value in fields.items():
    if field in bounds:
      made[field] = whole(called[field], value, *bounds[field])
    elif field in _FIELDS:
      form, expected, way_out = _FIELDS[field]
      made[field] = form(value)
      if made[field] is None:
        raise ValueError(
          f"Expected `{called[field]}` to be {expected}, got {value!r:.60}; {way_out}."
        )
    else:
      made[field] = value
  if {"relpos_buckets", "relpos_max_distance"} <= set(made):
    buckets, distance = made["relpos_buckets"], made["relpos_max_distance"]
    if distance <= buckets // 2:
      raise ValueError(
        f"Expected `{called['relpos_max_distance']}` beyond {buckets // 2}, half of"
        f" `{called['relpos_buckets']}`: nearer keys have a bucket each, got {distance}; T5 has"
        " 32 and 128."
      )
  if set(SIZES) <= set(made):
    _check_total(made)
  return made


def _check_total(fields: Mapping[str, Any]) -> None:
  attention = 4 * fields["emb_dim"] * fields["num_heads"] * fields["head_dim"]
  mlp = 2 * fields["emb_dim"] * fields["mlp_dim"]
  layers = fields["num_encoder_layers"] + 2 * fields["num_decoder_layers"]
  total = fields["vocab_size"] * fields["emb_dim"] + layers * (attention + mlp)
  if total > _MOST_PARAMETERS:
    raise ValueError(
      f"Expected a configuration of at most {_MOST_PARAMETERS:.1e} parameters, got about"
      f" {total:.1e} by its `vocab_size`, `emb_dim`, `mlp_dim`, heads and layers; one of them"
      " is damaged."
    )
