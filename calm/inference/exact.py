"""The rule that decodes exactly where nothing more is said than that it should."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from calm import exits
from calm.checkpoints import files
from calm.t5 import limits

if TYPE_CHECKING:
  from calm.inference import predictor as predictor_lib


def exact_rule(
  predictor: "predictor_lib.Predictor", draft_layer: int | None = None
) -> exits.Verified:
  """How a model decodes its full texts from its own exits, for `Predictor.generate`.

  Args:
    predictor: the model; drafts come from the shortlist of its options, where there is one.
    draft_layer: k; None: a quarter of the layers.

  Raises:
    ValueError: the draft layer is not below the last, or there is one layer only.
  """
  config, options = predictor.config, predictor.options
  layer = max(1, config.num_decoder_layers // 4) if draft_layer is None else draft_layer
  listed = options.shortlist is not None and not config.per_layer_heads
  rule = exits.Verified(layer, options.num_drafts, "shortlist" if listed else "full")
  rule.depth(config.num_decoder_layers)
  return rule


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
