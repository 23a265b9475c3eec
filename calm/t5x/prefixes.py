"""Forced prefixes: what is known of every row before it is decoded. Knows no T5X."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calm import exits
from calm.exits import layers as layers_lib
from calm.exits import schedules
from calm.t5 import caches


@struct.dataclass
class Rows:
  """What is known of every row before it is decoded, row by row.

  Attributes:
    encoded: the inputs' cross-attention keys and values.
    forced: at position i, whether the token after it is the prefix's, [rows, length] bool.
    generated: free positions before position i, [rows, length] int32.
    num_eos: EOS tokens in the prefix, which end nothing, [rows] int32.
    threshold: lambda, [rows] float32.
  """

  encoded: caches.Encoded
  forced: Bool[Array, "rows length"]
  generated: Int[Array, "rows length"]
  num_eos: Int[Array, " rows"]
  threshold: Float[Array, " rows"]


def prefix_of(
  decoder_input_tokens: Int[Array, "batch length"], eos_id: int | None, kept: bool
) -> Int[Array, "batch length"]:
  """The targets as a prefix to be forced, or none of them."""
  if not kept:
    return jnp.zeros_like(decoder_input_tokens)
  # As T5X does: an EOS at the prompt's end would end it.
  return jnp.where(decoder_input_tokens == eos_id, 0, decoder_input_tokens)


def make_rows(
  encoded: caches.Encoded,
  prefix: Int[Array, "batch length"],
  threshold: Float[Array, "..."],
  eos_id: int | Int[Array, ""],
  num_decodes: int = 1,
) -> Rows:
  """Rows of a batch, each prompt `num_decodes` times in a row, as T5X's loops lay them out.

  Args:
    encoded: from `caches.cross_attention_inputs`.
    prefix: BOS (0), then tokens to be forced, 0 where the model is free.
    threshold: lambda, [] or [batch].
    eos_id: the token that ends a row.
    num_decodes: sequences a prompt.
  """
  following = jnp.pad(prefix[:, 1:], ((0, 0), (0, 1)))
  forced = following != 0
  free = jnp.logical_not(forced).astype(jnp.int32)
  threshold = jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), prefix.shape[:1])
  rows = Rows(
    encoded=encoded,
    forced=forced,
    generated=jnp.cumsum(free, axis=1) - free,
    num_eos=jnp.sum(prefix == eos_id, axis=1),
    threshold=threshold,
  )
  return (
    rows if num_decodes == 1 else jax.tree.map(lambda x: jnp.repeat(x, num_decodes, 0), rows)
  )


@dataclasses.dataclass(frozen=True)
class AfterPrefix:
  """A schedule of free tokens: t starts after the prefix, which itself never exits early.

  A forced token is context, not output: what it stores is stored at full depth.
  """

  inner: schedules.Schedule
  rows: Rows
  name: ClassVar[str] = "after_prefix"

  def __call__(self, threshold, position):
    here = self.inner(threshold, at(self.rows.generated, position))
    return jnp.where(at(self.rows.forced, position), schedules.NEVER_EXIT, here)


@dataclasses.dataclass(frozen=True)
class DeepInPrefix:
  """A rule without a schedule (the oracle's), whose forced tokens run all of its layers."""

  inner: exits.StepRule
  rows: Rows

  @property
  def allowed(self) -> tuple[int, ...] | None:
    return getattr(self.inner, "allowed", None)

  @property
  def propagation(self) -> Any:
    return getattr(self.inner, "propagation", None)

  def depth(self, num_layers: int) -> int:
    return self.inner.depth(num_layers)

  def __call__(self, layers, hidden, active, threshold, generated) -> exits.TokenExit:
    arguments = (layers, hidden, active, threshold, generated)
    # Both run the same layers, which XLA computes once.
    deep = exits.StaticExit(self.depth(layers.num_layers))(*arguments)
    forced = at(self.rows.forced, generated)
    return layers_lib.select_rows(forced, deep, self.inner(*arguments))


def at(array: jax.Array, position: jax.Array) -> jax.Array:
  """The column of `array` [rows, length] at a position."""
  return lax.dynamic_index_in_dim(array, position, 1, keepdims=False)
