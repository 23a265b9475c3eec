"""Products of a few rows and a small matrix by `product_kernel`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.t5 import platforms
from calm.t5.native import calls

# Of x. A single row is multiplied by code that XLA:CPU compiles itself, in one thread as well.
MOST_ROWS = 16
# Of the matrices of a layer that one thread multiplies; XLA wakes a second one for less.
MOST_NUMBERS = 2**17
# Of any matrix beside such layers: a head.
MOST_OF_HEADS = 2**20


def alone(matrix: Any, rows: int) -> bool:
  """Whether so few rows meet layers so small that one thread is as fast as two.

  Args:
    matrix: the largest of a layer.
    rows: of the products.
  """
  can = platforms.has_wide_vectors() and calls.available()
  return can and small(matrix) and rows <= MOST_ROWS


def small(matrix: Any) -> bool:
  """Whether one thread multiplies a few rows by this matrix as fast as two do."""
  if not isinstance(matrix, jax.Array):
    return False
  return matrix.dtype == jnp.float32 and matrix.size <= MOST_NUMBERS


def product(
  x: Float[Array, "rows inputs"], matrix: Float[Array, "inputs outputs"]
) -> Float[Array, "rows outputs"] | None:
  """`x @ matrix` in one thread, beside layers that are `alone`; None where XLA is as fast."""
  float32 = x.dtype == matrix.dtype == jnp.float32
  if len(x) == 1 or matrix.size > MOST_OF_HEADS or not float32:
    return None
  shape = jax.ShapeDtypeStruct((len(x), matrix.shape[1]), "float32")
  return jax.ffi.ffi_call(_target(), shape)(x, matrix)


def _target() -> str:
  """What XLA calls the function, compiled when first asked for."""
  from calm.t5.native import product_kernel  # takes llvmlite

  return calls.target("calm_product", product_kernel.product)
