"""Parameter trees by "/"-joined path: digest, checks against a configuration,
exit parts.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from calm.exits.confidence import Probes
from calm.t5 import network

# Parts of the decoder that no full-depth text depends on.
EXIT_PARTS = (
  "exit_classifier",
  "exit_probes",
  "exit_translators",
  "exit_propagation",
)
_EXIT_PATHS = tuple(f"decoder/{part}/" for part in EXIT_PARTS)
# More than any published model has: looked for before they are traced.
_MANY_LAYERS = 48


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  """{path: leaf} of a tree, paths "/"-joined: "decoder/decoder_norm/scale"."""
  return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The tree of {path: leaf}; ValueError where a path goes on where another
  ends.
  """
  for path in flat:
    for above in itertools.accumulate(path.split("/")[:-1], "{}/{}".format):
      if above in flat:
        raise ValueError(
          f"Expected leaves of one tree, got {above!r}, and {path!r} below "
          "it; the checkpoint"
          " is damaged: copy it again."
        )
  return traverse_util.unflatten_dict(dict(flat), sep="/")


def unstack_layers(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{path: leaf} of T5X's examples/t5, of that or of what its
  examples/scalable_t5 has: there layers are stacked along axis 1, and heads
  have an axis of their own.
  """
  made = {}
  for path, stack in flat.items():
    side, first, *inner = path.split("/")
    if side != first:
      made[path] = stack
      continue
    for i in range(stack.shape[1]):
      leaf = stack[:, i]
      if leaf.ndim == 3:  # the kernel of an attention
        ends = (-1, leaf.shape[-1]) if "out" in inner else (leaf.shape[0], -1)
        leaf = leaf.reshape(ends)
      made["/".join((side, f"layers_{i}", *inner))] = leaf
  return made


def digest(params: Mapping[str, Any]) -> str:
  """sha256 (hexadecimal) over the sorted paths, shapes, dtypes and bytes of a
  tree.
  """
  made = hashlib.sha256()
  for path, leaf in sorted(flatten(params).items()):
    array = np.ascontiguousarray(leaf)
    made.update(f"{path} {list(np.shape(leaf))} {array.dtype.name}\n".encode())
    made.update(array.view(np.uint8).data if array.size else b"")
  return made.hexdigest()


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(the base model, the tree of the `EXIT_PARTS` that lie beside it)."""
  flat = flatten(params)
  beside = {
    path: leaf for path, leaf in flat.items() if path.startswith(_EXIT_PATHS)
  }
  base = {path: leaf for path, leaf in flat.items() if path not in beside}
  return unflatten(base), unflatten(beside)


def base_digest(params: Mapping[str, Any]) -> str:
  """`digest` of the base model alone, the same whatever exits lie beside it."""
  return digest(split(params)[0])


def by_layer(parts: Mapping[str, Any]) -> dict[int, Any]:
  """{1-based layer: what `layers_{i}` of a part holds}, ascending."""
  numbered = {
    int(name.removeprefix("layers_")) + 1: part for name, part in parts.items()
  }
  return dict(sorted(numbered.items()))


def check(params: Mapping[str, Any], config: network.T5Config) -> None:
  """ValueError that names the first leaf which is missing, of no use to
  `config`, of another shape, or not finite.
  """
  got = flatten(params)
  # Before the shapes of hundreds of layers are computed that a damaged number
  # asks for.
  for side in ("encoder", "decoder"):
    count = getattr(config, f"num_{side}_layers")
    last = f"{side}/layers_{count - 1}/"
    if count > _MANY_LAYERS and not any(path.startswith(last) for path in got):
      raise ValueError(
        f"Expected `params` to hold leaves of {last!r}, the last of "
        f"`num_{side}_layers`, got"
        f" none; {_way_out(last)}."
      )
  expected = expected_shapes(config)
  for path in (*expected, *sorted(set(got) - set(expected))):
    shape = expected.get(path)
    found = np.shape(got[path]) if path in got else None
    if shape is None:
      raise ValueError(
        f"Expected the leaves of `config`, got also {path!r}; {_way_out(path)}."
      )
    if found != shape:
      raise ValueError(
        f"Expected `params` to hold the leaf {path!r} of shape {shape}, got"
        f" {'none' if found is None else found}; {_way_out(path)}."
      )
    bad = np.size(got[path]) - int(
      np.isfinite(np.asarray(got[path], np.float32)).sum()
    )
    if bad:
      raise ValueError(
        f"Expected finite `params`, got {bad} of {np.size(got[path])} values "
        "NaN or infinite"
        f" in the leaf {path!r}; the checkpoint is damaged or its training "
        "diverged: take an"
        " earlier one."
      )


def _way_out(path: str) -> str:
  for part in EXIT_PARTS:
    if path.startswith(f"decoder/{part}/"):
      return f"set `{part}` of the config accordingly, or call `add_exit_parts`"
  if path.startswith("decoder/logits_dense_"):
    return (
      "all layers share one head; open it with the version of calm that "
      "wrote it"
    )
  return "the configuration is of another model, or the file of another kind"


@functools.lru_cache(maxsize=8)
def expected_shapes(config: network.T5Config) -> Mapping[str, tuple[int, ...]]:
  """{path: shape} of the parameters of `config`, computed without numbers."""
  model = network.Transformer(config)
  tokens = jnp.ones((1, 1), jnp.int32)
  made = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), tokens, tokens, tokens, enable_dropout=False
    )
  )
  return {path: leaf.shape for path, leaf in flatten(made["params"]).items()}


def add_exit_parts(
  params: Mapping[str, Any], config: network.T5Config
) -> dict[str, Any]:
  """Fills in the exit parts that `config` has and `params` lack, ready for
  training them, as the network initialises them: zeros (of learned propagation
  one factor is drawn).
  """
  flat = flatten(params)
  for path, shape in expected_shapes(config).items():
    if path not in flat and path.startswith(_EXIT_PATHS):
      drawn = np.zeros(shape)
      if path.endswith("/down/kernel"):
        drawn = np.random.default_rng(0).standard_normal(shape) / np.sqrt(
          shape[0]
        )
      flat[path] = drawn.astype(np.float32)
  return unflatten(flat)


def exit_fields(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `T5Config` that say which exit parts a tree of {path: leaf}
  holds.
  """
  layers = {"exit_translators": set(), "exit_propagation": set()}
  rank = 0
  for path, leaf in flat.items():
    _, part, *rest = [*path.split("/"), ""]
    if (
      part in layers and (number := rest[0].removeprefix("layers_")).isdecimal()
    ):
      layers[part].add(int(number) + 1)
      rank = len(leaf) if path.endswith("/down/bias") else rank
  return {
    "exit_classifier": "decoder/exit_classifier/kernel" in flat,
    "exit_probes": "decoder/exit_probes/kernel" in flat,
    "exit_propagation_rank": rank,
    **{part: tuple(sorted(found)) for part, found in layers.items()},
  }


def renew(
  params: Mapping[str, Any], fresh: Mapping[str, Any], parts: Sequence[str]
) -> dict[str, Any]:
  """`params` with some parts taken from `fresh`, a tree of the same paths;
  parts are names of the tree or paths, "exit_classifier",
  "decoder/layers_0/mlp". ValueError: no path has one.
  """
  flat = flatten(params)
  values = flatten(fresh)
  for part in parts:
    chosen = [path for path in flat if f"/{part}/" in f"/{path}/"]
    if not chosen:
      names = sorted({name for path in flat for name in path.split("/")[:2]})
      raise ValueError(
        "Expected `fresh` to name parts of the parameter tree (one of "
        f"{', '.join(names)}, or"
        f" a path below), got {part!r}, which no parameter's path holds."
      )
    flat |= {path: values[path] for path in chosen}
  return unflatten(flat)


def wider(
  params: Mapping[str, Any],
  config: network.T5Config,
  mlp_dim: int,
  seed: int = 0,
) -> dict[str, Any]:
  """Parameters with every MLP `mlp_dim` wide, of the same function (Net2Net's
  aim): new units read by random matrices of the same spread and write nothing,
  rows of zeros.
  """
  more = mlp_dim - config.mlp_dim
  draw = np.random.default_rng(seed)
  flat = flatten(params)
  for path, leaf in sorted(flat.items()):
    if "/mlp/wi" in path:
      leaf = np.asarray(leaf)
      new = draw.normal(0.0, leaf.std(), (len(leaf), more)).astype(leaf.dtype)
      flat[path] = np.concatenate([leaf, new], axis=1)
    elif "/mlp/wo" in path:
      flat[path] = np.pad(np.asarray(leaf), ((0, more), (0, 0)))
  return unflatten(flat)


def probes(params: Mapping[str, Any]) -> Probes | None:
  """The exit probes of a tree, or None."""
  found = params["decoder"].get("exit_probes")
  if found is None:
    return None
  return Probes(
    *(jnp.asarray(found[name]) for name in ("kernel", "features", "bias"))
  )


def head_kernel(
  params: Mapping[str, Any], config: network.T5Config
) -> jax.Array:
  """The output head of all layers, float32 [emb_dim, vocab].

  Tied: embedding.T / sqrt(emb_dim), as T5X scales it.
  """
  if config.logits_via_embedding:
    table = jnp.asarray(params["token_embedder"]["embedding"], jnp.float32)
    return table.T / np.sqrt(config.emb_dim).astype(np.float32)
  return jnp.asarray(params["decoder"]["logits_dense"]["kernel"], jnp.float32)
