"""A matrix cut into columns, which XLA:CPU multiplies side by side.

A product of two to 32 rows and a whole matrix of T5 small's sizes is one call, which threads
share. Those with 64 of its columns at a time take less of the processor's time (T5 1.1 small,
all matrices of its layers, 8 rows, one core: 11.3 and 6.6 ms), each in one thread; and where
many are ready at a time (more than eight, as measured), XLA gives half of them to another
thread. So the same sums take less time, for a program that takes longer to compile.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Shaped

# Columns of a piece; where that makes too few pieces to be shared out, half of it.
WIDTH = 64
LEAST_PIECES = 12
# Matrices up to so many numbers stay whole: they are multiplied in less time than it takes to
# put the products of their pieces side by side.
LEAST_NUMBERS = 2**17
# XLA:CPU compiles code of its own for a product of a single row; more go to a library.
_LEAST_ROWS = 2


@struct.dataclass
class Columns:
  """A matrix in pieces.

  Attributes:
    pieces: from left to right, in the dtype of the matrix.
  """

  pieces: tuple[Shaped[Array, "inputs width"], ...]

  def product(self, x: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
    """`x @ matrix`, in the dtype of `x`.

    The sums are those of the matrix in one piece but for rounding, as sums of another number of
    rows are.
    """
    rows = len(x)
    wide = jnp.pad(x, ((0, max(0, _LEAST_ROWS - rows)), (0, 0)))
    parts = [wide @ piece.astype(x.dtype) for piece in self.pieces]
    return jnp.concatenate(parts, axis=1)[:rows]


def width(outputs: int) -> int:
  """Columns of a piece of a matrix that has `outputs`."""
  return WIDTH if outputs >= LEAST_PIECES * WIDTH else WIDTH // 2


def is_cut(inputs: int, outputs: int) -> bool:
  """Whether a matrix of this size is cut."""
  return inputs * outputs > LEAST_NUMBERS


def cut(matrix: Shaped[Array, "inputs outputs"]) -> jax.Array | Columns:
  """The matrix in pieces; as it is where it is small."""
  inputs, outputs = matrix.shape
  if not is_cut(inputs, outputs):
    return matrix
  step = width(outputs)
  return Columns(tuple(matrix[:, at : at + step] for at in range(0, outputs, step)))
