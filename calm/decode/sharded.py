"""Prompts over several devices: every device runs a decode loop of its own on
its rows, by `shard_map`, and nothing is exchanged. Under plain `jit` all would
run as long as the longest.
"""

import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import sharding

from calm.decode import compiled, loop
from calm.decode import program as program_lib
from calm.t5 import caches

AXIS = "prompts"
MOST_CPU_DEVICES = 256  # that are made because somebody names a number
# Rows of every leaf of a batch lie along its first axis.
ROWS = sharding.PartitionSpec(AXIS)
REPLICATED = sharding.PartitionSpec()


def make_cpu_devices(count: Any) -> None:
  """Has JAX divide the CPU into so many devices (threads), where it has not
  looked for any yet and no flag asks for a number.
  """
  asked = "xla_force_host_platform_device_count" in os.environ.get(
    "XLA_FLAGS", ""
  )
  if not isinstance(count, int) or not 1 < count <= MOST_CPU_DEVICES:
    return  # who uses it refuses it
  now = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
  if not asked and count > now:
    with contextlib.suppress(RuntimeError):  # it has them
      jax.config.update("jax_num_cpu_devices", count)


@functools.cache
def mesh(num_devices: int) -> sharding.Mesh:
  """The first devices of this process as a mesh of one axis; ValueError if
  there are fewer.
  """
  devices = jax.local_devices()
  if not 1 <= num_devices <= len(devices):
    raise ValueError(
      f"Expected `num_devices` in 1 ... {len(devices)}, the devices that JAX "
      "sees, got"
      f" {num_devices}; on a CPU, JAX_NUM_CPU_DEVICES=N makes N, and so does "
      "loading a model"
      " with `num_devices=N` before JAX has computed anything."
    )
  return sharding.Mesh(np.asarray(devices[:num_devices]), (AXIS,))


def replicate(
  weights: program_lib.ModelWeights, num_devices: int
) -> program_lib.ModelWeights:
  """The weights on every device, once for all calls; as they are where there is
  one.
  """
  if num_devices == 1:
    return weights
  return jax.device_put(
    weights, sharding.NamedSharding(mesh(num_devices), REPLICATED)
  )


@dataclasses.dataclass(frozen=True)
class ShardedProgram:
  """A `program.Program` whose batches are split over devices, which run it on
  their rows.
  """

  program: program_lib.Program
  num_devices: int

  def encode(self, weights, encoder_input_tokens) -> caches.Encoded:
    """As `Program.encode`; the rows are padded to a multiple of the devices."""
    return self._encode(weights, self._padded(encoder_input_tokens))

  def decode(self, weights, encoded, active, threshold) -> loop.Generation:
    """As `Program.decode`, for as many rows as `active` has."""
    threshold = jnp.asarray(threshold, jnp.float32)
    if threshold.ndim:
      threshold = self._padded(threshold)
    made = self._decode(weights, encoded, self._padded(active), threshold)
    return jax.tree.map(lambda leaf: leaf[: len(active)], made)

  def generate(self, weights, encoded, active, threshold) -> loop.Generation:
    """As `Program.generate`."""
    return program_lib.fetch(self.decode(weights, encoded, active, threshold))

  @compiled.Method
  def _encode(self, weights, tokens) -> Any:
    return self._sharded(self.program.encode, REPLICATED, ROWS)(weights, tokens)

  @compiled.Method
  def _decode(self, weights, encoded, active, threshold) -> Any:
    limit = ROWS if threshold.ndim else REPLICATED
    decode = self._sharded(self.program.decode, REPLICATED, ROWS, ROWS, limit)
    return decode(weights, encoded, active, threshold)

  def _sharded(self, function, *specs):
    # Loops of different lengths on different devices are what this is for:
    # nothing is checked to vary alike.
    return jax.shard_map(
      function,
      mesh=mesh(self.num_devices),
      in_specs=specs,
      out_specs=ROWS,
      check_vma=False,
    )

  def _padded(self, array: jax.Array | np.ndarray) -> jax.Array:
    """With zeros below, up to a multiple of the devices."""
    missing = -len(array) % self.num_devices
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
