"""A model with wider layers that computes what the narrower one did, to go on training from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm.t5 import network, parameters


def wider(
  params: Mapping[str, Any], config: network.T5Config, mlp_dim: int, seed: int = 0
) -> tuple[dict[str, Any], network.T5Config]:
  """Parameters and sizes with every MLP `mlp_dim` wide, of the same function (Net2Net's aim).

  New units read what random ones would (matrices drawn with the spread of those that are
  there) and write nothing (rows of zeros), so that the first update decides what they are for.

  Args:
    params: the tree of `config`.
    config: sizes.
    mlp_dim: units of every MLP, encoder and decoder, as T5 has it; at least `config.mlp_dim`.
    seed: of the draws.

  Raises:
    ValueError: `mlp_dim` is less than the model has.
  """
  more = mlp_dim - config.mlp_dim
  if more < 0:
    raise ValueError(
      f"Expected `mlp_dim` of at least the {config.mlp_dim} that the checkpoint has, got"
      f" {mlp_dim}; units are added, never dropped."
    )
  draw = np.random.default_rng(seed)
  flat = parameters.flatten(params)
  for path, leaf in sorted(flat.items()):
    if "/mlp/wi" in path:
      leaf = np.asarray(leaf)
      new = draw.normal(0.0, leaf.std(), (len(leaf), more)).astype(leaf.dtype)
      flat[path] = np.concatenate([leaf, new], axis=1)
    elif "/mlp/wo" in path:
      flat[path] = np.pad(np.asarray(leaf), ((0, more), (0, 0)))
  return parameters.unflatten(flat), dataclasses.replace(config, mlp_dim=mlp_dim)
