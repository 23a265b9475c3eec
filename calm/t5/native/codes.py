"""Products of many rows in 8 bits by `codes_kernel`: those of `EightBits`, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.t5 import eight_bits, platforms
from calm.t5.native import calls

# Columns of a vector and inputs of a quad, as `codes_kernel` multiplies them.
LANES, QUAD = 16, 4


def pack(matrix: eight_bits.EightBits) -> eight_bits.EightBits:
  """The matrix with its codes laid out for `product_in_8_bits` where a CPU gains by it."""
  outputs, inputs = matrix.codes.shape
  can = platforms.multiplies_bytes() and calls.available()
  if not can or outputs % LANES or inputs % LANES:
    return matrix
  beside = matrix.codes.reshape(-1, LANES, inputs // QUAD, QUAD).swapaxes(1, 2)
  return dataclasses.replace(matrix, packed=beside.reshape(-1, inputs // QUAD, LANES * QUAD))


def product_in_8_bits(
  matrix: eight_bits.EightBits, x: Float[Array, "*rows inputs"]
) -> Float[Array, "*rows outputs"]:
  """The `product` of a packed matrix by the CPU's own 8-bit instructions.

  Codes, sums and scales are those that XLA takes, so that only seconds differ.
  """
  assert matrix.packed is not None
  rows = x.reshape(-1, x.shape[-1])
  shape = jax.ShapeDtypeStruct
  given = shape(rows.shape, jnp.uint8), shape(rows.shape[:1], jnp.float32)
  codes, steps = jax.ffi.ffi_call(_target("codes"), given)(rows)
  made = jax.ffi.ffi_call(
    _target("product"), shape((len(rows), len(matrix.sums)), jnp.float32)
  )(codes, steps, matrix.packed, matrix.sums, matrix.scales)
  return made.reshape(*x.shape[:-1], -1)


def _target(name: str) -> str:
  """What XLA calls the function, compiled when first asked for."""
  from calm.t5.native import codes_kernel  # takes llvmlite

  make, threads = getattr(codes_kernel, name), calls.threads()
  return calls.target(f"calm_{name}_in_8_bits", lambda: make(threads))
