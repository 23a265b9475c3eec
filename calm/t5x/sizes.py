"""A network's sizes, of T5X's own T5 1.1 module or of ours, and what its objective needs.

This module does not import T5X.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from calm import exits
from calm.exits import confidence
from calm.t5 import network
from calm.training import objectives

_LOG = logging.getLogger(__name__)


def needs_classifier(rule: exits.StepRule, objective: objectives.Objective) -> bool:
  """Whether the exit classifier is measured or trained."""
  measured = isinstance(getattr(rule, "measure", None), confidence.Classifier)
  return measured or isinstance(objective, objectives.ExitClassifier)


def z_loss(
  objective: objectives.Objective, sums: objectives.BatchMetrics, trains: bool
) -> jax.Array:
  """The part of a batch's summed loss that penalises log(Z)^2; 0 without such a part."""
  if not isinstance(objective, objectives.LayerWeighted):
    return jnp.zeros(())
  weights: Any = objective.weights(len(sums.cross_entropy))
  if trains and objective.sampled_layers:
    weights = 1 / objective.sampled_layers
  return sums.loss - jnp.sum(weights * sums.cross_entropy)


def config_of(module: Any, exit_classifier: bool = True) -> network.T5Config:
  """The sizes of T5X's own T5 1.1 network, or of ours, as our configuration.

  Args:
    module: the network.
    exit_classifier: whether a network of T5X's, whose sizes say nothing of it, gets one.

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
    given["exit_classifier"] = exit_classifier
    if not exit_classifier:
      _LOG.warning(
        "No exit classifier: neither the measure nor the objective needs one, and the"
        " parameter tree is T5X's own."
      )
  return network.T5Config(**given)
