"""What a platform likes: how caches lie, and how many rows a product has at least."""

import contextlib
import contextvars
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def laid_out_for(platform: str) -> Iterator[None]:
  """What is traced inside is as a platform likes it: to compile for another than JAX's.

  What was traced before stays as it is.
  """
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def _on(platform: str) -> bool:
  return (_PLATFORM.get() or jax.default_backend()) == platform


def _on_tpu() -> bool:
  return _on("tpu")


def heads_beside() -> bool:
  """Whether a position's heads lie side by side in one row, as a TPU likes it.

  There 64 numbers of a head take the room of 128 and are read as such (compiled for TPU v3, its
  compiler expects 2.7 times the cycles at 8 rows and length 512). On a CPU whole caches would
  be transposed at every step instead.
  """
  return _on_tpu()


def key_value_apart(matrices: Any) -> bool:
  """Whether a layer's keys and values are projected by two matrices of this dtype, not by one.

  XLA:TPU lays one matrix out anew before the loop, so that the two halves of its products lie
  apart. Where weights are stored as products read them, in bfloat16, that is a second copy for
  every layer that may be skipped: temporaries of 1.33 times the caches and not of 1.20 (T5 1.1
  small, compiled for TPU v3, `Deferred`, 8 rows, length 512, all in bfloat16). float32 matrices
  are copied to that precision anyhow: apart they save `Deferred` less than a hundredth.

  Two products cost more of a step's estimated cycles: in float32 static models 1.3 to 2.3 %,
  `Deferred` 0.6 to 1.4 % up to 8 rows (0.1 % less at 32, 0.7 % less at 128), `Eager` up to 3 %;
  in bfloat16 `Deferred` 0.9 % at that size, static 2.2 %. Of the engines `Compacted` alone, no
  default on a TPU, takes a tenth more with one: it lays the matrix out anew at every token.
  """
  return _on_tpu() and jnp.dtype(matrices).itemsize < 4


def least_rows() -> int:
  """Rows below which a product takes no less time: of a tile of a TPU's registers, or 1."""
  return 8 if _on_tpu() else 1


def least_positions(rows: int) -> int:
  """Positions of `rows` rows that are projected and written in one go at least.

  On a TPU a tile of rows together; and two where the rows fill the lanes of a register, since
  XLA:TPU lays a cache out with rows last to write one position of them, and copies all of it to
  be read (compiled for TPU v3, T5 1.1 small, 128 rows: 130 thousand cycles a layer, of 402).
  """
  if not _on_tpu():
    return 1
  return 2 if rows % 128 == 0 else max(1, least_rows() // rows)


def product(
  x: Float[Array, "batch inputs"], matrix: Float[Array, "inputs outputs"]
) -> Float[Array, "batch outputs"]:
  """`x @ matrix`, with rows of zeros added up to `least_rows`.

  XLA:TPU multiplies the vector of a single row element by element, from the matrix in float32.
  With a tile of rows it takes the matrix unit: compiled for TPU v3, its compiler expects 87
  thousand cycles of the head of T5 1.1 small where it expects 294 for one row.
  """
  rows = x.shape[0]
  if not isinstance(rows, int) or rows >= least_rows():
    return x @ matrix
  return (jnp.pad(x, ((0, least_rows() - rows), (0, 0))) @ matrix)[:rows]


def attends_by_row() -> bool:
  """Whether some rows of a batch attend one after another, not all rows at a time.

  A core reads one row's caches after another's anyhow, and a loop reads no other rows' (T5 1.1
  small, 128 positions, 2 cores, 4, 8, 12 and 20 of 32 rows: 0.46, 0.77, 1.08 and 1.73 ms a
  layer; all 32 at a time 1.6, copies of 8 together 0.9).
  """
  return _on("cpu")


def runs_in_this_process() -> bool:
  """Whether a program may call functions of the process that compiles it (`native`)."""
  return _on("cpu")


def wakes_threads() -> bool:
  """Whether operations that are ready together are given to other threads, as XLA:CPU does."""
  return _on("cpu")


def grows_caches() -> bool:
  """Whether decoding under a long limit begins with short caches (`decode.staged`).

  Elsewhere nothing was measured. And XLA:TPU keeps the caches of a loop in the precision of its
  products where nothing else reads them; here the next stage does.
  """
  return _on("cpu")


def multiplies_unsigned() -> bool:
  """Whether 8-bit products are faster where one side has no sign.

  So it is with x86's VNNI instructions: XLA:CPU takes 0.5, 1.0 and 2.6 ms for 2, 8 and 32 rows
  of T5 1.1 small's head where two signed sides take 0.6, 1.7 and 4.6. Elsewhere it may have no
  kernel for them.
  """
  return _on("cpu") and "vnni" in _processor()


def has_wide_vectors() -> bool:
  """Whether a core has 32 registers of 16 numbers (AVX-512), which `native` products fill."""
  return _on("cpu") and "avx512f" in _processor()


def multiplies_bytes() -> bool:
  """Whether a core multiplies 64 bytes by 64 and adds them by fours (AVX512-VNNI)."""
  return _on("cpu") and "avx512_vnni" in _processor()


@functools.cache
def _processor() -> str:
  """What the processor says it can do."""
  try:
    return pathlib.Path("/proc/cpuinfo").read_text("utf-8", "replace")
  except OSError:  # not Linux
    return ""
