"""The argmax of a head in 8 bits by `head_kernel`, in parts that XLA runs side by side."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.exits import layers
from calm.t5 import quantized_heads
from calm.t5.native import calls

# Rounded logits that are fewer are looked through in less time than the calls cost.
LEAST_NUMBERS = 2**16
# Of a part: its logits lie on a thread's stack.
MOST_PIECES = 2**14


def greedy(
  head: quantized_heads.QuantizedHead, states: Float[Array, "batch emb"]
) -> layers.Greedy | None:
  """As `QuantizedHead.greedy`; None where XLA's own is as fast.

  Args:
    head: the head.
    states: decoder_norm(d^i), float32.
  """
  (batch, _), count = states.shape, len(head.rows)
  if batch * count < LEAST_NUMBERS or head.rows.dtype != jnp.float32 or not calls.available():
    return None
  parts = max(-(-calls.pieces() // batch), -(-count // MOST_PIECES))
  places, numbers = _asked(head, states, -(-count // parts))
  best, peak, total = jnp.moveaxis(numbers.reshape(batch, -1, 3), 2, 0)
  places = places.reshape(best.shape)
  most = jnp.max(best, axis=1, keepdims=True)
  token = jnp.min(jnp.where(best == most, places, count - 1), axis=1)
  sums = jnp.sum(total * jnp.exp(peak - most), axis=1)
  return layers.Greedy(token, -jnp.log(sums))


def _asked(
  head: quantized_heads.QuantizedHead, states: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
  """What `head_kernel.head` says of every row's parts of `size` pieces, one after another."""
  codes, steps = quantized_heads.coded(states)
  sums, offset = head.coded.raw_sums(jnp.concatenate(codes))
  sums = sums.reshape(len(codes), len(states), -1)
  rows = [*quantized_heads.slack_factors(states, quantized_heads.seen(codes, steps)), *steps]
  rows = jnp.concatenate(rows, axis=1)
  given = sums, head.coded.sums, head.coded.scales, head.left, head.norms, rows, states
  count = len(states) * -(-len(head.rows) // size)
  made = [
    jax.ffi.ffi_call(
      _target(len(codes)), (_shape(end - begin, dtype="int32"), _shape(end - begin, 3))
    )(jnp.array([begin, size, offset], jnp.int32), *given, head.rows)
    for begin, end in itertools.pairwise(calls.ends(count, calls.pieces()))
  ]
  places, numbers = zip(*made, strict=True)
  return jnp.concatenate(places), jnp.concatenate(numbers)


def _shape(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _target(num_codes: int) -> str:
  """What XLA calls the function, compiled when first asked for."""
  from calm.t5.native import head_kernel  # takes llvmlite

  return calls.target(f"calm_head_{num_codes}", lambda: head_kernel.head(num_codes))
