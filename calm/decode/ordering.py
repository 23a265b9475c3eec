"""When an operation of a compiled step runs: after others, where its inputs do not say so.

XLA:CPU begins what has its inputs. A cache that is written before it is read would be copied
whole. And of ten operations that are ready at once it gives half to another thread: to wake one
takes longer than all of them, where they are as small as these.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from calm.exits.layers import KeyValue
from calm.t5 import platforms


def after(position: jax.Array, made: jax.Array) -> jax.Array:
  """`position`, in a form that XLA can know only once it has `made` (any float array).

  A cache that is read after its update was made would be copied whole at every step; tied to
  what the reads lead to, the update waits for every one of them. `lax.optimization_barrier`
  says the same, but XLA:CPU drops it before it decides on copies: with it the tests of the
  compiled loop (hlo_test) find them.
  """
  bits = lax.bitcast_convert_type(made.reshape(-1)[0].astype(jnp.float32), jnp.int32)
  # Without its lowest bit and shifted, it is never negative, whatever the float is: adds 0.
  return position + jnp.minimum(lax.shift_right_logical(bits, 1), 0)


def after_each(
  position: jax.Array, rows: Sequence[KeyValue], last: jax.Array
) -> list[jax.Array]:
  """`position` for every layer's cache, in a form that is known once that cache has been read.

  What a layer stores is made of the state that the one below made of its cache. So updates
  become ready layer by layer, not all of them at the end. Elsewhere than on a CPU they wait for
  the last layer: a mesh would send one number more a layer.

  Args:
    position: [] or [batch].
    rows: keys and values of the layers, ascending.
    last: what the last layer's state led to.
  """
  end = after(position, last)
  if not platforms.wakes_threads():
    return [end] * len(rows)
  return [*(after(position, row.key) for row in rows[1:]), end]
