"""The rule that decodes exactly where nothing more is said than that it should."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from calm import exits
from calm.checkpoints import files
from calm.inference.options import IN_8_BITS, VERIFIED, DecodeOptions
from calm.inference.procedures import batch_size_affects_output
from calm.t5 import costs, limits, network

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib


def exact_rule(
  predictor: "predictor_lib.Predictor", draft_layer: int | None = None
) -> exits.Verified:
  """How a model decodes its full texts from its own exits, for `Predictor.generate`.

  Drafts come from the shortlist of the model's options where that pays: the whole head is right
  where the shortlist lacks the token, and costs more. It pays where the head has more weights
  than the layers below it (T5 1.1 small: three times as many; the model in the box: half as
  many, and every third draft of its list of 256 tokens is refused for want of the token).

  Args:
    predictor: the model.
    draft_layer: k; None: a quarter of the layers.

  Raises:
    ValueError: the draft layer is not below the last, or there is one layer only; or it would
      not be exact (`can_be_exact`).
  """
  config, options = predictor.config, predictor.options
  if not can_be_exact(predictor):
    names = ("weights_dtype", "encoder_dtype")
    in_8_bits = [name for name in names if getattr(options, name) == IN_8_BITS]
    got = f"`{in_8_bits[0]}` {IN_8_BITS!r}" if in_8_bits else f"`dtype` {config.dtype!r}"
    way_out = "leave one of the two out" if in_8_bits else "give `dtype` 'float32'"
    raise ValueError(
      f"Expected states in float32 for exact decoding, got {got}: passes over drafts would be"
      f" rounded otherwise than full depth's tokens; {way_out}."
    )
  layer = max(1, config.num_decoder_layers // 4) if draft_layer is None else draft_layer
  rule = exits.Verified(layer, options.num_drafts, _draft_head(config, options, layer))
  rule.depth(config.num_decoder_layers)
  return rule


def with_draft_head(
  config: network.T5Config, options: DecodeOptions, given: Collection[str]
) -> DecodeOptions:
  """The options; of 'verified', without a shortlist where the whole head drafts better.

  Args:
    config: of the model.
    options: how it is to decode.
    given: fields that a user has named: who names a shortlist keeps it.
  """
  layers = options.exit_layers or ()
  asked = options.measure == VERIFIED and "measure" in given and "shortlist" not in given
  if not asked or len(layers) != 1 or _draft_head(config, options, layers[0]) == "shortlist":
    return options
  return dataclasses.replace(options, shortlist=None)


def _draft_head(
  config: network.T5Config, options: DecodeOptions, layer: int
) -> exits.verified.DraftHead:
  listed = options.shortlist is not None and not config.per_layer_heads
  cost = costs.decoding_costs(config, input_length=1, cache_length=1)
  return "shortlist" if listed and cost.head.flops > layer * cost.layer.flops else "full"


def can_be_exact(predictor: "predictor_lib.Predictor") -> bool:
  """Whether texts from drafts are those of full depth.

  A pass reads several positions where full depth reads one, and sums of other numbers of rows
  differ in their last bits: where states are rounded to few, such a bit may change a text.
  """
  return not batch_size_affects_output(predictor.config, predictor.options)


def stored_rule(path: pathlib.Path) -> exits.Verified | None:
  """The rule that a folder's `full_depth.json` names, where it was measured to be faster.

  Raises:
    ValueError: the file is damaged (names it).
  """
  stored = files.read_json(path).get("exact")
  if stored is None:
    return None
  known = {field.name for field in dataclasses.fields(exits.Verified)}
  with files.naming(path):
    if not isinstance(stored, dict) or set(stored) != known:
      raise ValueError(f"Expected `exact` to have {sorted(known)}, got {stored!r}.")
    for name in ("draft_layer", "num_drafts"):
      limits.whole(name, stored[name], 1, limits.LONGEST)
    for name in ("adapts", "measures"):
      if not isinstance(stored[name], bool):
        raise ValueError(f"Expected `{name}` to be true or false, got {stored[name]!r}.")
    if type(stored["stop_below"]) not in (int, float):
      raise ValueError(f"Expected `stop_below` in [0, 1], got {stored['stop_below']!r}.")
    return exits.Verified(**stored)
