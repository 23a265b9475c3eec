"""Arrays that hold nothing yet, made in one call."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from calm.t5.native import calls

# XLA's threads share what is more, which is worth it.
MOST_NUMBERS = 2**19

Tree = TypeVar("Tree")


def zeros_like(arrays: Tree) -> Tree:
  """Zeros of these shapes.

  XLA:CPU makes one array and copies it: for a few rows of a small model more operations than a
  step has layers, so many at once that a thread is woken for half of them.

  Args:
    arrays: zeros that XLA would make; those that it makes as fast are given back.
  """
  leaves, tree = jax.tree.flatten(arrays)
  ours = [i for i, leaf in enumerate(leaves) if leaf.dtype in (jnp.float32, jnp.int32)]
  few = sum(leaves[i].size for i in ours) <= MOST_NUMBERS
  if not (ours and few and calls.available()):
    return arrays
  shapes = [jax.ShapeDtypeStruct((leaves[i].size,), leaves[i].dtype) for i in ours]
  made = jax.ffi.ffi_call(_target(len(ours)), shapes)()
  for i, flat in zip(ours, made, strict=True):
    leaves[i] = flat.reshape(leaves[i].shape)
  return jax.tree.unflatten(tree, leaves)


def _target(count: int) -> str:
  """What XLA calls the function for so many arrays, compiled when first asked for."""
  from calm.t5.native import zeros_kernel  # takes llvmlite

  return calls.target(f"calm_zeros_{count}", lambda: zeros_kernel.zeros(count))
