"""What a platform likes: how caches lie, and how many rows a product has at
least.
"""

import contextlib
import contextvars
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "platform", default=None
)


@contextlib.contextmanager
def laid_out_for(platform: str) -> Iterator[None]:
  """What is traced inside is as a platform likes it: to compile for another
  than JAX's.
  """
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def require_platform() -> None:
  """ValueError where JAX finds no device of the kinds that JAX_PLATFORMS names:
  it says so by an AssertionError without a word where a plugin is missing.
  """
  try:
    jax.default_backend()
  except (AssertionError, RuntimeError) as error:
    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    got = str(error) or "no plugin or no device of it"
    raise ValueError(
      f"Expected devices of JAX_PLATFORMS={asked}, got: {got}; install its "
      "plugin (`pip install 'jax[cuda12]'` or 'jax[tpu]'), unset it, or set it "
      "to cpu."
    ) from error


def _on(platform: str) -> bool:
  return (_PLATFORM.get() or jax.default_backend()) == platform


def merged_heads() -> bool:
  """Whether caches are [batch, length, heads * head_dim]: a TPU pads the 64
  numbers of a head to 128 lanes (v3: 2.7 times the cycles at 8 rows and length
  512); a CPU would transpose whole caches at every step.
  """
  return _on("tpu")


def key_value_apart(matrices: Any) -> bool:
  """Whether keys and values are projected by two matrices of this dtype, not by
  one, which XLA:TPU lays out anew before the loop: in bfloat16 a second copy
  for every layer that may be skipped. In float32 two products cost up to 3 % of
  a step's estimated cycles.
  """
  return _on("tpu") and jnp.dtype(matrices).itemsize < 4


def least_rows() -> int:
  """Rows below which a product takes no less time: of a tile of a TPU's
  registers, or 1.
  """
  return 8 if _on("tpu") else 1


def least_positions(rows: int) -> int:
  """Positions of `rows` rows that are projected and written in one go at least.
  On a TPU a tile of rows together; and two where rows fill a register's lanes,
  as XLA:TPU would lay the cache out with rows last to write one, and copy it to
  be read.
  """
  if not _on("tpu"):
    return 1
  return 2 if rows % 128 == 0 else max(1, least_rows() // rows)


def product(
  x: Float[Array, "batch inputs"], matrix: Float[Array, "inputs outputs"]
) -> Float[Array, "batch outputs"]:
  """`x @ matrix`, with rows of zeros added up to `least_rows`: XLA:TPU
  multiplies a single row element by element, a tile by the matrix unit (294 and
  87 thousand cycles of T5 1.1 small's head on v3).
  """
  rows = x.shape[0]
  if not isinstance(rows, int) or rows >= least_rows():
    return x @ matrix
  return (jnp.pad(x, ((0, least_rows() - rows), (0, 0))) @ matrix)[:rows]


# Columns of 8-bit codes that lie together on a CPU: a row of them fills a line
# of memory; and codes of a column that one instruction multiplies and adds.
WIDTH = 64
GROUP = 4


def is_cpu() -> bool:
  """Whether XLA:CPU computes: in this process, whose functions it may call
  (`kernels`).

  It gives operations that are ready together to other threads, a loop over rows
  reads no other rows' caches, and decoding under a long limit gains by short
  caches at first (`program.stage_lengths`; XLA:TPU keeps a loop's caches in the
  precision of its products where nothing else reads them, as the next stage
  does).
  """
  return _on("cpu")


def adds_products() -> bool:
  """Whether an instruction multiplies four codes of 16 columns, and adds
  (AVX-512 VNNI).
  """
  return _on("cpu") and "avx512_vnni" in _processor()


def has_wide_vectors() -> bool:
  """Whether a core has 32 registers of 16 numbers (AVX-512), which
  `tiled_product` fills.
  """
  return _on("cpu") and "avx512f" in _processor()


@functools.cache
def _processor() -> str:
  try:
    return pathlib.Path("/proc/cpuinfo").read_text("utf-8", "replace")
  except OSError:  # not Linux
    return ""
