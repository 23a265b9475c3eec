"""Rows are split along axes that divide them, and weights lie where loops read them."""

import jax
import jax.numpy as jnp
import pytest
from flax.linen import partitioning

from calm.t5 import network
from calm.t5x import loops
from tests import engine


def test_rows_are_split_along_axes_that_divide_them():
  mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
  assert loops.row_axes(mesh, 16) == ("data", "model")
  assert loops.row_axes(mesh, 12) == ("data",)
  assert loops.row_axes(mesh, 3) == ()
  assert loops.row_axes(mesh, object()) == (), "a symbolic batch is never split"
  assert loops.row_axes(jax.sharding.AbstractMesh((1, 4), ("data", "model")), 6) == ()
  assert loops.row_axes(jax.sharding.AbstractMesh((), ()), 8) == ()
  assert [loops.rows_of_a_device(mesh, x, 16) for x in (("data", "model"), ())] == [2, 16]


def test_weights_are_gathered_where_a_device_holds_them():
  large = jax.ShapeDtypeStruct((2, loops.APART_BYTES // 4), jnp.float32)
  assert loops.fits({"a": jnp.zeros(3)}) and not loops.fits({"a": large})


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
  before, after = names(variables), names(loops.kept_whole(variables))
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
