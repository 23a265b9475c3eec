"""What XLA:CPU computes slowly, as functions of this process that XLA calls, a
file each. Without llvmlite (`pip install 'calm-t5x[cpu]'`), or on another
platform, XLA computes all of it; texts are the same but for what a last bit
decides.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from calm.t5 import platforms

__all__ = [
  "attend",
  "attend_within",
  "available",
  "coded_heads",
  "coded_product",
  "is_small",
  "multiplies_codes",
  "one_thread",
  "peaks",
  "reads",
  "reads_tiles",
  "rescored",
  "row_steps",
  "tile_width",
  "tiled_product",
  "writes_heads",
]

_HAS_LLVMLITE = importlib.util.find_spec("llvmlite") is not None
# Products of two numbers that are worth a second thread.
SHARED_PRODUCTS = 2**22
MOST_NUMBERS = 2**17  # of a small layer's largest matrix


def _kernel(name: str) -> Any:
  """The file of a kernel, which imports llvmlite."""
  return importlib.import_module(f"calm.t5.kernels.{name}_kernel")


def available() -> bool:
  """Whether XLA can be given functions that LLVM compiles."""
  return platforms.is_cpu() and _HAS_LLVMLITE


def reads(keys: jax.Array, values: jax.Array) -> bool:
  """Whether `attend` reads keys and values of this layout."""
  return (
    keys.dtype == values.dtype == jnp.float32 and keys.ndim == 4 and available()
  )


def attend(
  rows: Int[Array, " queries"] | None,
  query: Float[Array, "queries heads head_dim"],
  keys: Float[Array, "batch heads length head_dim"],
  values: Float[Array, "batch heads length head_dim"],
  bias: Float[Array, "queries_batch_or_one heads_or_one length"],
  now: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  single_threaded: bool = False,
) -> Float[Array, "queries heads_head_dim"]:
  """softmax(keys query + bias) values, of every query and head.

  Args:
    rows: the row of the batch that each query reads; of queries with a negative
      one the result is 0. None: as many read each row, in the batch's order.
    query, keys, values: the batch's, which it `reads`.
    bias: of the keys: for each query, for each row of the batch, or for all.
      Keys at `layers.MASK_BIAS` before the first or behind the last that is not
      are not read; a query that sees none gets 0.
    now: one key more of every query, its value [queries, heads, head_dim], bias
      [heads].
    single_threaded: whether one thread makes the layer's products, the others
      asleep.
  """
  return _kernel("attention").attend(
    rows, query, keys, values, bias, now, single_threaded
  )


def attend_within(
  begins: Int[Array, " prompts_and_end"],
  counts: Int[Array, " prompts"],
  query: Float[Array, "tokens heads head_dim"],
  key: Float[Array, "tokens heads head_dim"],
  value: Float[Array, "tokens heads head_dim"],
  biases: Float[Array, "heads distances"],
) -> Float[Array, "tokens heads head_dim"]:
  """softmax(keys query + bias) values, of every token over its own prompt.

  Args:
    begins: where each prompt begins, then how many tokens there are.
    counts: tokens of each prompt; behind them, up to where the next begins, the
      result is 0.
    query, key, value: float32.
    biases: by position of the key less the query's, from 1 - n to n - 1, n of
      the longest.
  """
  return _kernel("prompt").attend(begins, counts, query, key, value, biases)


def is_small(matrix: Any) -> bool:
  """Whether XLA wakes a second thread to multiply a row by a matrix that is not
  in tiles, where one is as fast.
  """
  return (
    getattr(matrix, "dtype", None) == jnp.float32
    and matrix.size <= MOST_NUMBERS
  )


def tile_width(dtype: Any) -> int:
  """Columns of a tile: a row of one of codes fills a line of memory, one of
  numbers two.
  """
  return platforms.WIDTH if dtype == jnp.int8 else platforms.WIDTH // 2


def reads_tiles(dtype: Any) -> bool:
  """Whether a float32 model's matrices of this dtype are faster in tiles."""
  return dtype == jnp.float32 and platforms.has_wide_vectors() and available()


def one_thread(rows: int, tiles: jax.Array) -> bool:
  """Whether one thread multiplies so many rows by a matrix as fast as two
  do.
  """
  # Codes are multiplied twice as fast; up to eight rows wait for float32
  # numbers to be read.
  rows = -(-rows // 2) if tiles.dtype == jnp.int8 else max(8, rows)
  return rows * tiles.size < SHARED_PRODUCTS


def row_steps(inputs: int) -> int:
  """Steps of the largest number of a row that `tiled_product` multiplies with
  codes: as many as sums of so many products have room for in 32 bits.
  """
  return min(2**15 - 1, (2**31 - 1) // (127 * inputs))


def tiled_product(
  x: Float[Array, "rows inputs"],
  tiles: Int8[Array, "tiles pairs width two"]
  | Float[Array, "tiles inputs width"],
  scales: Float[Array, " columns"] | None,
) -> Float[Array, "rows columns"]:
  """The product with a matrix in tiles, of float32 rows.

  Args:
    x: float32 rows.
    tiles: the matrix, in tiles of `tile_width` columns that lie side by side.
    scales: what each column's codes are multiplied with, which meet rows of 16
      bits, of steps of their own; None of numbers.
  """
  return _kernel("tiles").product(
    x, tiles, scales, not one_thread(len(x), tiles)
  )


def multiplies_codes(activations: Sequence[str] = ()) -> bool:
  """Whether there is `coded_product`, with these activations."""
  known = {*activations} <= {"linear", "relu", "gelu"}
  return known and platforms.adds_products() and available()


def coded_product(
  x: Float[Array, "rows inputs"],
  matrices: Sequence[Any],
  activations: Sequence[str] = (),
  count: Int[Array, ""] | None = None,
) -> Float[Array, "rows outputs"]:
  """`EightBits.product`, or a feed-forward block of such products.

  Args:
    x: float32 rows.
    matrices: in tiles; all but the last are multiplied with x, then with each
      other.
    activations: of each of those, by name.
    count: rows that are asked for; behind them the result is 0.
  """
  return _kernel("coded").product(x, matrices, activations, count)


def writes_heads(heads: int, head_dim: int) -> bool:
  """Whether `coded_heads` writes heads of so many numbers."""
  return head_dim % 16 == heads * head_dim % platforms.WIDTH == 0


def coded_heads(
  x: Float[Array, "tokens inputs"],
  begins: Int[Array, " prompts_and_end"],
  counts: Int[Array, " prompts"],
  matrix: Any,
  first: int,
  shape: tuple[int, int, int, int],
) -> Float[Array, "prompts heads length head_dim"]:
  """`EightBits.product` of the tokens of prompts; 0 behind a prompt's end.

  Args:
    x, begins, counts: float32 rows, and the prompts as in `attend_within`.
    matrix, first: it lies in tiles, and is read from this column on.
    shape: of the result.
  """
  return _kernel("coded").heads(x, [matrix], (), begins, counts, first, shape)


def peaks(logits: Float[Array, "rows pieces"]) -> tuple[jax.Array, ...] | None:
  """The fields of `exits.layers.Peaks`, in their order, of one reading of the
  logits where XLA reads them for each; None where nothing is compiled.
  """
  return _kernel("logits").peaks(logits) if available() else None


def rescored(
  logits: Float[Array, "rows pieces"],
  norms: Float[Array, " rows"],
  slack: Float[Array, " pieces"],
  states: Float[Array, "rows inputs"],
  head: Float[Array, "pieces inputs"],
) -> Float[Array, "rows pieces"]:
  """Logits, those that may be the largest of a row multiplied again.

  Args:
    logits: at most `norms[i] * slack[j]` away from the product's.
    norms, slack: see there.
    states, head: float32; the product is `states @ head.T`.
  """
  return _kernel("logits").rescored(logits, norms, slack, states, head)
