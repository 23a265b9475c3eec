"""Rows are split along axes that divide them, and weights lie where loops read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from calm.t5 import network
from calm.t5x import meshes
from tests import engine


def test_rows_are_split_along_axes_that_divide_them():
  mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
  assert meshes.row_axes(mesh, 16) == ("data", "model")
  assert meshes.row_axes(mesh, 12) == ("data",)
  assert meshes.row_axes(mesh, 3) == ()
  assert meshes.row_axes(mesh, object()) == (), "a symbolic batch is never split"
  assert meshes.row_axes(jax.sharding.AbstractMesh((1, 4), ("data", "model")), 6) == ()
  assert meshes.row_axes(jax.sharding.AbstractMesh((), ()), 8) == ()


def test_options_with_a_number_for_every_row_are_split():
  given = {"temperature": jnp.ones(2), "max_decode_steps": np.full(2, 5), "topk": jnp.array(3)}
  given |= {"decode_rng": jax.random.PRNGKey(0), "eos_id": 1, "alpha": jnp.ones(3)}
  by_row, traced, static = meshes.split_options(given, 2)
  assert by_row.keys() == {"temperature", "max_decode_steps"}
  assert traced.keys() == {"topk", "alpha"} and static == {"eos_id": 1}


def test_weights_are_gathered_where_a_device_holds_them():
  large = jax.ShapeDtypeStruct((2, meshes.APART_BYTES // 4), jnp.float32)
  assert meshes.fits({"a": jnp.zeros(3)}) and not meshes.fits({"a": large})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_large_parameters_do_not_stay_whole_whatever_they_are_stored_in(dtype):
  shaped = lambda size: {"token_embedder": {}, "decoder": jax.ShapeDtypeStruct((size,), dtype)}
  assert meshes.may_stay_whole(shaped(meshes.KEPT_BYTES // 4))
  assert not meshes.may_stay_whole(shaped(meshes.KEPT_BYTES // 4 + 1))


@pytest.mark.parametrize("maps", [{}, engine.MAPS], ids=["plain", "maps"])
def test_a_decoder_that_is_kept_whole_lies_along_no_mesh_axis(maps):
  """Nor do maps beside it, whether or not it is kept whole."""
  toy = engine.toy(**maps)
  tokens = jnp.ones((1, 4), jnp.int32)
  init = network.Transformer(toy.config).init
  variables = jax.eval_shape(lambda key: init(key, tokens, tokens, tokens), jax.random.key(0))
  names = lambda made: {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      partitioning.get_axis_names(made["params_axes"]),
      is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
    )
  }
  before, after = names(variables), names(meshes.kept_whole(variables))
  rules = (("vocab", "model"), ("mlp", "model"), ("joined_kv", "model"), ("heads", "model"))
  rules += (("embed", None), ("kv", None), ("relpos_buckets", None))
  changed = {path for path in before if before[path] != after[path]}
  along = {
    path
    for path, axes in before.items()
    if "model" in partitioning.logical_to_mesh_axes(axes, rules)
  }
  read = {path for path in along if "'encoder'" not in path}
  assert before.keys() == after.keys() and changed == read
  assert len(read) > 10 and len(along) > len(read)
  assert not any("exit_" in path for path in along) and bool(maps) == any(
    "exit_propagation" in path for path in before
  )
  for path in read:
    assert set(partitioning.logical_to_mesh_axes(after[path], rules)) <= {None}
    assert len(after[path]) == len(before[path])
