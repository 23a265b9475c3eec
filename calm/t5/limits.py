"""The configuration of a T5 network, and the bounds of its fields, far beyond
any T5 that was published. `config.json` files, T5X's shapes and gin files are
all held against this table.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
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
  # Half of them for each direction, half of those for exact distances: less
  # leaves none.
  "relpos_buckets": (4, 2**12),
  "relpos_max_distance": (3, 2**20),
}
# Exit layers that have linear maps of their own.
EXIT_LAYERS = ("exit_translators", "exit_propagation")
ACTIVATIONS = (
  *(
    "celu",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
  ),
  *(
    "leaky_relu",
    "linear",
    "log_sigmoid",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
  ),
  *("soft_sign", "softplus", "swish", "tanh"),
)
# The bias of masked attention (`layers.MASK_BIAS`) is -inf in float16, and a
# row with nothing to attend to NaN.
DTYPES = ("float32", "bfloat16")
_DAMAGED = "it is damaged, or of something else than a T5"
# Tokens of a prompt or of a text; attention over more would not fit any
# machine.
LONGEST = 2**16


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes and choices of one model; static, so that changing any recompiles."""

  # rows of the embedding (may exceed the pieces of the vocabulary)
  vocab_size: int
  # of activations; parameters, logits and confidences are float32
  dtype: Any = "float32"
  emb_dim: int = 512  # width of the residual stream
  num_heads: int = 8  # attention heads
  num_encoder_layers: int = 6  # layers of the encoder
  num_decoder_layers: int = 6  # layers of the decoder
  head_dim: int = 64  # size of an attention head
  mlp_dim: int = 2048  # hidden units of a feed-forward block
  # ('gelu', 'linear') is T5 1.1's gated GELU, ('relu',) is T5 1.0.
  mlp_activations: Sequence[str] = ("relu",)
  dropout_rate: float = 0.1  # in [0, 1), in training only
  # tie the output head to the embedding (T5 1.0)
  logits_via_embedding: bool = False
  # attention scores in float32 whatever `dtype`
  float32_attention_logits: bool = False
  # Embed by a one-hot product (partitioned training) or by a gather.
  one_hot_embedding: bool = True
  # whether the tree holds the early-exit classifier
  exit_classifier: bool = True
  relpos_buckets: int = 32  # of relative positions
  # from which on all positions share the last bucket
  relpos_max_distance: int = 128
  # Relative-position biases of every layer's own (umT5, Pile-T5, T5X's scalable
  # T5) instead of one embedding for all layers of a side.
  relpos_per_layer: bool = False
  # whether it holds every layer's own probe (`confidence.Probes`)
  exit_probes: bool = False
  # 1-based layers below the last whose states heads read through a linear map
  # of the layer's own: x + x A_i + b_i, x = decoder_norm(d^i).
  exit_translators: Sequence[int] = ()
  # 1-based layers below the last from which the inputs of skipped layers are
  # predicted by a linear map (see `propagation.Learned`).
  exit_propagation: Sequence[int] = ()
  exit_propagation_rank: int = 0  # rank of these maps, 0 without them

  def __post_init__(self):
    # Gin gives lists, and dtypes by name or object: one form, so that it can be
    # hashed.
    for name, value in check(dataclasses.asdict(self)).items():
      object.__setattr__(self, name, value)
    for name in EXIT_LAYERS:
      if max(getattr(self, name), default=0) >= self.num_decoder_layers:
        raise ValueError(
          f"Expected `{name}` to be layers below the last of "
          f"{self.num_decoder_layers} decoder"
          f" layers, got {list(getattr(self, name))}; leave the last out, "
          "whose head reads its"
          " own states."
        )
    if bool(self.exit_propagation) != bool(self.exit_propagation_rank):
      raise ValueError(
        "Expected `exit_propagation` with `exit_propagation_rank`, got the "
        "layers"
        f" {list(self.exit_propagation)} and the rank "
        f"{self.exit_propagation_rank}; give both,"
        " or neither."
      )


def whole(
  name: str, value: Any, least: int, most: int, way_out: str = _DAMAGED
) -> int:
  """A whole number in bounds; ValueError of anything else."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not whole or not least <= int(value) <= most:
    raise ValueError(
      f"Expected `{name}` to be in {least} ... {most}, a whole number, got "
      f"{value!r:.60};"
      f" {way_out}."
    )
  return int(value)


_FLAGS = {
  field.name for field in dataclasses.fields(T5Config) if field.type is bool
}
_EXPECTED: Mapping[str, str] = {
  "dropout_rate": "a number in [0, 1)",
  "mlp_activations": f"a list of one to four of {', '.join(ACTIVATIONS)}",
  "dtype": f"the type of activations, one of {', '.join(DTYPES)}",
  **dict.fromkeys(
    EXIT_LAYERS, "a list of decoder layers, ascending from 1, each once"
  ),
  **dict.fromkeys(_FLAGS, "true or false"),
}


def _form(field: str, value: Any) -> Any:
  """The one form of a field that is no size; None of a value that it cannot
  have.
  """
  listed = isinstance(value, list | tuple)
  if field in _FLAGS:
    return bool(value) if type(value).__name__ in ("bool", "bool_") else None
  if field == "dropout_rate":
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if real and 0 <= float(value) < 1 else None
  if field == "mlp_activations":
    known = (
      listed
      and 1 <= len(value) <= 4
      and all(word in ACTIVATIONS for word in value)
    )
    return tuple(value) if known else None
  if field == "dtype":
    try:
      name = jnp.dtype(value).name
    except (TypeError, ValueError):
      return None
    return name if name in DTYPES else None
  ascending = listed and all(type(layer) is not bool for layer in value)
  ascending = ascending and all(
    isinstance(layer, numbers.Integral) for layer in value
  )
  if not ascending or list(value) != sorted(
    {*value} & {*range(1, SIZES["num_decoder_layers"][1] + 1)}
  ):
    return None
  return tuple(map(int, value))


def check(
  fields: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Fields of a `T5Config` that are given, in their one form; `names` are what
  the file calls them, for the ValueError of the first one of another type or
  out of its bounds.
  """
  called = {name: name for name in fields} | dict(names or {})
  made = dict(fields)
  for field, value in fields.items():
    if field in SIZES:
      made[field] = whole(called[field], value, *SIZES[field])
    elif field == "exit_propagation_rank":
      # more than `emb_dim` says nothing more
      made[field] = whole(called[field], value, 0, SIZES["emb_dim"][1])
    elif field in _EXPECTED:
      made[field] = _form(field, value)
      if made[field] is None:
        raise ValueError(
          f"Expected `{called[field]}` to be {_EXPECTED[field]}, got "
          f"{value!r:.60}; give one,"
          " or restore the file."
        )
  if {"relpos_buckets", "relpos_max_distance"} <= set(made):
    buckets = made["relpos_buckets"]
    distance = made["relpos_max_distance"]
    if distance <= buckets // 2:
      raise ValueError(
        f"Expected `{called['relpos_max_distance']}` beyond {buckets // 2}, "
        "half of"
        f" `{called['relpos_buckets']}`: nearer keys have a bucket each, got "
        f"{distance}; T5 has"
        " 32 and 128."
      )
  return made
