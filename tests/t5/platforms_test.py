"""What depends on the platform that a program is made for."""

import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from calm.t5 import platforms

MATRIX = jnp.sin(jnp.arange(15.0)).reshape(3, 5)


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_a_product_is_the_same_with_rows_added(rows):
  x = jnp.cos(jnp.arange(3.0 * rows)).reshape(rows, 3)
  with platforms.laid_out_for("tpu"):
    made = platforms.product(x, MATRIX)
  assert made.shape == (rows, 5)
  np.testing.assert_allclose(
    made, np.asarray(x) @ np.asarray(MATRIX), rtol=1e-5, atol=1e-6
  )


def test_positions_that_are_written_together_fill_a_tile_and_not_the_lanes():
  def positions():
    return [platforms.least_positions(rows) for rows in (1, 2, 8, 32, 128, 256)]

  with platforms.laid_out_for("tpu"):
    assert positions() == [8, 4, 1, 1, 2, 2]
  with platforms.laid_out_for("cpu"):
    assert positions() == [1] * 6


@pytest.mark.parametrize(
  ("asked", "flag"),
  [
    (platforms.adds_products, "avx512_vnni"),
    (platforms.has_wide_vectors, "avx512f"),
  ],
)
def test_only_a_cpu_with_the_instructions_is_said_to_have_them(
  monkeypatch, asked, flag
):
  monkeypatch.setattr(platforms, "_processor", lambda: f"flags: fma {flag}")
  assert asked() == (jax.default_backend() == "cpu")
  with platforms.laid_out_for("tpu"):
    assert not asked()
  monkeypatch.setattr(platforms, "_processor", lambda: "flags: fma avx2")
  assert not asked()


def test_a_platform_that_jax_lacks_is_one_named_error():
  code = "import calm; calm.load()"
  environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
  ended = subprocess.run(
    [sys.executable, "-c", code],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.stderr.splitlines()[-1].startswith(
    "ValueError: Expected devices of JAX_PLATFORMS=cuda, got: "
  )
