"""What a configuration may say, whichever file it comes from, before anything is allocated.

Our own `config.json`, Hugging Face's, the shapes of a T5X checkpoint and gin files all become
a `T5Config`, whose fields are held against this one table. The bounds lie far beyond any T5
that was published (T5-11B: emb_dim 1024, mlp_dim 65536, 24 layers, 128 heads).
"""

import numbers
from collections.abc import Mapping
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
# Rank of learned propagation; more than `emb_dim` says nothing more.
RANKS: Mapping[str, tuple[int, int]] = {"exit_propagation_rank": (0, 2**16)}
# Exit layers that have linear maps of their own.
EXIT_LAYERS = ("exit_translators", "exit_propagation")
FLAGS = (
  "logits_via_embedding",
  "float32_attention_logits",
  "one_hot_embedding",
  "per_layer_heads",
  "exit_classifier",
  "relpos_per_layer",
  "exit_probes",
)
ACTIVATIONS = (
  *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh"),
  *("leaky_relu", "linear", "log_sigmoid", "relu", "relu6", "selu", "sigmoid", "silu"),
  *("soft_sign", "softplus", "swish", "tanh"),
)
# Activations; the bias of masked attention (`layers.MASK_BIAS`) is -inf in float16, and a row
# with nothing to attend to NaN.
DTYPES = ("float32", "bfloat16")
# Numbers of a model in all: a quarter of a terabyte in float32.
_MOST_PARAMETERS = 2**36
_DAMAGED = "it is damaged, or of something else than a T5"
# Tokens of a prompt or of a text; attention over more would not fit any machine.
LONGEST = 2**16


def check(fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
  """Fields of a `T5Config` in their one form; those that are not given are not looked at.

  Args:
    fields: by their names in `T5Config`.
    names: what the file calls them, for messages.

  Raises:
    ValueError: the first field that is of another type or out of its bounds.
  """
  called = {name: name for name in fields} | dict(names or {})
  made = dict(fields)
  for name in made:
    if bounds := SIZES.get(name) or RANKS.get(name):
      made[name] = whole(called[name], made[name], *bounds)
    elif name in EXIT_LAYERS:
      made[name] = _layers(called[name], made[name])
    elif name in FLAGS:
      made[name] = _flag(called[name], made[name])
  if "dropout_rate" in made:
    made["dropout_rate"] = _rate(called["dropout_rate"], made["dropout_rate"])
  if "mlp_activations" in made:
    made["mlp_activations"] = _activations(called["mlp_activations"], made["mlp_activations"])
  if "dtype" in made:
    made["dtype"] = _dtype(called["dtype"], made["dtype"])
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


def whole(name: str, value: Any, least: int, most: int, way_out: str = _DAMAGED) -> int:
  """A whole number in bounds.

  Raises:
    ValueError: another type, or out of bounds.
  """
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(
      f"Expected `{name}` to be a whole number, got {_shown(value)}"
      f" ({type(value).__name__}); write it without quotes or fraction."
    )
  if not least <= int(value) <= most:
    raise ValueError(
      f"Expected `{name}` to be in {least} ... {most}, got {_shown(value)}; {way_out}."
    )
  return int(value)


def _flag(name: str, value: Any) -> bool:
  if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
    raise ValueError(f"Expected `{name}` to be true or false, got {_shown(value)}; write one.")
  return bool(value)


def _layers(name: str, value: Any) -> tuple[int, ...]:
  most = SIZES["num_decoder_layers"][1]
  listed = value if isinstance(value, list | tuple) else [0]
  layers = tuple(whole(name, layer, 0, most) for layer in listed)
  if list(layers) != sorted(set(layers)) or 0 in layers:
    raise ValueError(
      f"Expected `{name}` to be a list of decoder layers, ascending from 1, got"
      f" {_shown(value)}; give each once."
    )
  return layers


def _rate(name: str, value: Any) -> float:
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not 0 <= float(value) < 1:
    raise ValueError(
      f"Expected `{name}` to be a number in [0, 1), got {_shown(value)}; T5 trains with 0.1."
    )
  return float(value)


def _activations(name: str, value: Any) -> tuple[str, ...]:
  listed = isinstance(value, list | tuple) and 1 <= len(value) <= 4
  if not listed or not all(isinstance(word, str) and word in ACTIVATIONS for word in value):
    raise ValueError(
      f"Expected `{name}` to be a list of one to four of {', '.join(ACTIVATIONS)}, got"
      f" {_shown(value)}; T5 1.1 has ['gelu', 'linear'], T5 1.0 has ['relu']."
    )
  return tuple(value)


def _dtype(name: str, value: Any) -> str:
  try:
    found = jnp.dtype(value).name
  except (TypeError, ValueError):
    found = None
  if found not in DTYPES or value is None:
    raise ValueError(
      f"Expected `{name}` to be the type of activations, one of {', '.join(DTYPES)}, got"
      f" {_shown(value)}; take 'float32', or 'bfloat16' for less memory."
    )
  return found


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


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."
