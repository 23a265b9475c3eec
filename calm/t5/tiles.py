"""Matrices in tiles of columns, which lie side by side: few rows wait for a
matrix to be read, and memory is read fastest in its own order.
"""

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
  """A matrix of float32 numbers, or of 8-bit codes: column j is nearly
  `codes[:, j] * scales[j]`.
  """

  # One tile, or those that `kernels.tiled_product` reads.
  numbers: (
    Shaped[Array, "tiles inputs width"] | Int8[Array, "tiles pairs width two"]
  )
  scales: Float[Array, " columns"] | None  # of codes
  # columns; those of the last tile behind are 0
  outputs: int = struct.field(pytree_node=False)

  def product(
    self, x: Float[Array, "rows inputs"], native: bool
  ) -> Float[Array, "rows outputs"]:
    """`x @ matrix`, in the dtype of `x`; `native` as in `engines.Task`."""
    width = kernels.tile_width(self.numbers.dtype)
    if native and kernels.available() and self.numbers.shape[2] == width:
      made = kernels.tiled_product(x, self.numbers, self.scales)
    else:
      tiles = (
        self.numbers
        if self.numbers.ndim == 3
        else jnp.swapaxes(self.numbers, 2, 3)
      )
      tiles = jnp.moveaxis(tiles.reshape(len(tiles), -1, tiles.shape[-1]), 0, 1)
      matrix = tiles.reshape(len(tiles), -1)[: x.shape[1]]
      made = platforms.product(x, matrix.astype(x.dtype))
      made = made if self.scales is None else made * self.scales[None, :]
    return made[:, : self.outputs].astype(x.dtype)


def tiled(
  matrix: Shaped[Array, "inputs outputs"],
  scales: Float[Array, " outputs"] | None = None,
) -> Tiles:
  """A matrix of float32 numbers, or of codes with `scales`, as `Tiles`."""
  (inputs, outputs), native = matrix.shape, kernels.available()
  width = kernels.tile_width(matrix.dtype) if native else outputs
  missing = -outputs % width
  odd = inputs % 2 if native and scales is not None else 0
  matrix = jnp.pad(matrix, ((0, odd), (0, missing)))
  tiles = jnp.moveaxis(matrix.reshape(len(matrix), -1, width), 1, 0)
  if scales is None:
    return Tiles(tiles, None, outputs)
  if native:
    tiles = jnp.swapaxes(tiles.reshape(len(tiles), -1, 2, width), 2, 3)
  return Tiles(tiles, jnp.pad(scales, (0, missing)), outputs)


def with_inputs(
  matrix: jax.Array | Tiles, inputs: Sequence[int]
) -> jax.Array | Tiles:
  """The rows of a matrix that are multiplied with these inputs."""
  rows = np.asarray(inputs)
  if isinstance(matrix, Tiles):
    return dataclasses.replace(matrix, numbers=matrix.numbers[:, rows])
  return matrix[rows]
