"""A network's sizes, of T5X's own T5 1.1 module or of ours, and what its objective needs.

This module does not import T5X.
"""

import logging
from collections.abc import Sequence
from typing import Any

from calm import arguments, exits
from calm.t5 import network
from calm.training import objectives

_LOG = logging.getLogger(__name__)


@arguments.checked()
def needed_parts(rule: exits.Rule, objective: objectives.Objective) -> tuple[str, ...]:
  """Exit parts of the decoder that are measured or trained, fields of `T5Config`."""
  measured = getattr(getattr(rule, "measure", None), "part", None)
  return (*objective.parts, *([measured] if measured else []))


def config_of(
  module: Any,
  parts: Sequence[str] = ("exit_classifier",),
  exit_maps: tuple[Sequence[int], int] | None = None,
) -> network.T5Config:
  """The sizes of T5X's own T5 1.1 network, or of ours, as our configuration.

  Args:
    module: the network.
    parts: exit parts that a network of T5X's, whose sizes say nothing of them, gets.
    exit_maps: layers that have a translator and learned propagation, and the rank of that (0:
      without it), whatever the sizes say; None: as they say.

  Raises:
    ValueError: the module is of another architecture, or its sizes ask for what this
      network does not have (`scale_attn_logits` of T5X's contrib/gpu).
  """
  theirs: Any = getattr(module, "config", None)
  if theirs is None or not hasattr(theirs, "emb_dim") or hasattr(theirs, "scan_layers"):
    raise ValueError(
      "Expected `module` to be calm.t5.network.Transformer, or the Transformer of T5X's"
      f" examples/t5/network.py, got {type(module).__module__}.{type(module).__name__};"
      " scanned layers and Flaxformer's architectures have other parameter trees."
    )
  known = {field.name for field in network.T5Config.__dataclass_fields__.values()}
  for name, field in getattr(theirs, "__dataclass_fields__", {}).items():
    if name not in known and getattr(theirs, name) != field.default:
      raise ValueError(
        f"Expected {type(theirs).__module__}.{type(theirs).__name__}.{name} of {field.default},"
        f" got {getattr(theirs, name)}, which this network does not have; leave it out."
      )
  given = {name: getattr(theirs, name) for name in known if hasattr(theirs, name)}
  if "exit_classifier" not in given:
    given |= {part: part in parts for part in ("exit_classifier", "exit_probes")}
    if not parts:
      _LOG.warning(
        "No exit classifier: neither the measure nor the objective needs one, and the"
        " parameter tree is T5X's own."
      )
  if exit_maps is not None:
    layers, rank = exit_maps
    given |= {"exit_translators": layers, "exit_propagation": layers if rank else ()}
    given |= {"exit_propagation_rank": rank}
  return network.T5Config(**given)
