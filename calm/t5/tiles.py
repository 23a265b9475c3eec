"""Matrices in tiles of columns, which lie side by side: few rows wait for a matrix to be read,
and memory is read fastest in its own order."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int8, Shaped

from calm.t5 import kernels, platforms


@struct.dataclass
class Tiles:
  """A matrix of float32 numbers, or of 8-bit codes for states that are not rounded: column j is
  nearly `numbers[:, :, j] * scales[j]`."""

  # One tile, or those that `kernels.tiled_product` reads.
  numbers: Int8[Array, "tiles inputs width"] | Float[Array, "tiles inputs width"]
  scales: Float[Array, " columns"] | None  # of codes
  outputs: int = struct.field(pytree_node=False)  # columns; those of the last tile behind are 0

  def product(
    self, x: Float[Array, "rows inputs"], native: bool
  ) -> Float[Array, "rows outputs"]:
    """`x @ matrix`, in the dtype of `x`; `native` as in `engines.Task`."""
    width = kernels.tile_width(self.numbers.dtype)
    if native and kernels.available() and self.numbers.shape[2] == width:
      made = kernels.tiled_product(x, self.numbers, self.scales)
    else:
      matrix = jnp.moveaxis(self.numbers, 0, 1).reshape(x.shape[1], -1)
      made = platforms.product(x, matrix.astype(x.dtype))
      made = made if self.scales is None else made * self.scales[None, :]
    return made[:, : self.outputs].astype(x.dtype)


def tiled(
  matrix: Shaped[Array, "inputs outputs"], scales: Float[Array, " outputs"] | None = None
) -> Tiles:
  """A matrix of float32 numbers, or of codes with `scales`, as `Tiles`."""
  inputs, outputs = matrix.shape
  width = kernels.tile_width(matrix.dtype) if kernels.available() else outputs
  missing = -outputs % width
  tiles = jnp.pad(matrix, ((0, 0), (0, missing))).reshape(inputs, -1, width)
  scales = None if scales is None else jnp.pad(scales, (0, missing))
  return Tiles(jnp.moveaxis(tiles, 1, 0), scales, outputs)


def with_inputs(matrix: jax.Array | Tiles, inputs: Sequence[int]) -> jax.Array | Tiles:
  """The rows of a matrix that are multiplied with these inputs."""
  rows = np.asarray(inputs)
  if isinstance(matrix, Tiles):
    return dataclasses.replace(matrix, numbers=matrix.numbers[:, rows])
  return matrix[rows]
