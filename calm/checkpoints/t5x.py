"""T5X checkpoints (legacy and Orbax) -> parameters by path, without T5X.

The legacy format (the public T5 1.1) is a msgpack file `checkpoint` whose large
leaves are references to zarr arrays beside it; Orbax keeps the same train state
under `state/`, in one database or in many folders. The optimizer's state is not
read.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from calm import arguments, storage
from calm.checkpoints import files
from calm.t5 import network, parameters

# No compressor of theirs makes less of more than this.
_SMALL = 2**20
_MOST_COMPRESSION = 1100
# The file of an array that says its shape, and what of tensorstore reads it.
_METADATA = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
_STEP = re.compile(r"checkpoint_(\d+)")


def find(path: pathlib.Path) -> pathlib.Path | None:
  """The T5X checkpoint folder that `path` is or holds (its newest step), or
  None.
  """
  if (path / "checkpoint").is_file() or _orbax_state(path) is not None:
    return path
  steps = {
    int(match[1]): child
    for child in path.iterdir()
    if (match := _STEP.fullmatch(child.name)) and child.is_dir()
  }
  return find(steps[max(steps)]) if steps else None


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """{path: float32 array} of the target's parameters; `path` is what `find`
  returned.
  """
  state = _orbax_state(path)
  leaves = _read_arrays(state) if state else _read_legacy(path)
  found = {
    name: files.as_float32(name, leaf, path) for name, leaf in leaves.items()
  }
  return parameters.unstack_layers(found)


def infer_config(flat: Mapping[str, np.ndarray]) -> network.T5Config:
  """The configuration that names and shapes tell; T5X stores none beside its
  checkpoints.

  Assumed, as no shape tells: gated layers are GELU (T5 1.1), others ReLU (T5
  1.0), and `relpos_max_distance` is 128, which T5X's network has fixed.
  """
  try:
    vocab_size, emb_dim = flat["token_embedder/embedding"].shape
    bias = "decoder/layers_0/relpos_bias/rel_embedding"
    per_layer = bias in flat
    bias = bias if per_layer else "decoder/relpos_bias/rel_embedding"
    num_heads, relpos_buckets = flat[bias].shape
    joined_kv = flat["decoder/layers_0/self_attention/query/kernel"].shape[1]
    mlp_dim = flat["decoder/layers_0/mlp/wo/kernel"].shape[0]

    def number(path, side):
      return re.match(rf"{side}/layers_(\d+)/", path)

    layers = [
      1 + max(int(found[1]) for path in flat if (found := number(path, side)))
      for side in ("encoder", "decoder")
    ]
  except (KeyError, IndexError, ValueError) as error:
    message = "Expected `path` to hold the parameters of T5X's own T5 network"
    raise ValueError(
      f"{message}, got {sorted(flat)[:4]}, lacking {error}."
    ) from error
  gated = "decoder/layers_0/mlp/wi_0/kernel" in flat
  return network.T5Config(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    num_heads=num_heads,
    num_encoder_layers=layers[0],
    num_decoder_layers=layers[1],
    head_dim=joined_kv // max(num_heads, 1),
    mlp_dim=mlp_dim,
    mlp_activations=("gelu", "linear") if gated else ("relu",),
    logits_via_embedding="decoder/logits_dense/kernel" not in flat,
    **parameters.exit_fields(flat),
    relpos_buckets=relpos_buckets,
    relpos_per_layer=per_layer,
  )


def _orbax_state(path: pathlib.Path) -> pathlib.Path | None:
  """The folder that holds the train state itself."""
  return next(
    (f for f in (path / "state", path) if (f / "_METADATA").is_file()), None
  )


def _read_legacy(path: pathlib.Path) -> dict[str, Any]:
  """Small leaves are in the msgpack; a large one is in the zarr array of its
  name.

  Its reference tells only that: where else it points, be it a bucket, is not
  looked at.
  """
  with storage.reading(
    path, "a T5X checkpoint whose msgpack opens", "copy it again"
  ):
    contents = serialization.msgpack_restore((path / "checkpoint").read_bytes())
    target = contents["optimizer"]["target"]

  def is_reference(node):
    return isinstance(node, dict) and {"driver", "kvstore"} <= set(node)

  leaves: dict[str, Any] = traverse_util.flatten_dict(
    target, is_leaf=lambda _, node: is_reference(node), sep="/"
  )
  if not isinstance(target, dict) or not all(
    isinstance(name, str) for name in leaves
  ):
    expected = (
      f"Expected the `target` of {str(path)!r} to be a tree of parameters"
    )
    raise ValueError(f"{expected}, got {type(target).__name__}.")
  large = {name for name, leaf in leaves.items() if is_reference(leaf)}
  arrays = _read_arrays(path) if large else {}
  if missing := sorted(large - set(arrays)):
    expected = (
      f"Expected {str(path)!r} to hold the arrays that its msgpack refers to"
    )
    raise ValueError(f"{expected}, got none for {missing[:3]}.")
  return leaves | {name: arrays[name] for name in large}


def _read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """{path: array} of a database of Orbax's, or of folders, read by tensorstore
  alone.

  Orbax reads all of a train state at once: of a damaged one every array has its
  traceback.
  """
  ts = arguments.package(
    "tensorstore", "read T5X checkpoints", "'calm-t5x[train]'"
  )
  base: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute()}/"}
  if (folder / "manifest.ocdbt").is_file():
    base = {"driver": "ocdbt", "base": base}
  with storage.reading(folder, "a whole T5X checkpoint", "copy it again"):
    keys = [
      key.decode() for key in ts.KvStore.open(base).result().list().result()
    ]
    opened = {}
    for end, driver in _METADATA.items():
      for key in keys:
        if key.startswith("target.") and key.endswith(end):
          array = key[: -len(end)]
          store = {**base, "path": f"{base.get('path', '')}{array}/"}
          name = array.removeprefix("target.").replace(".", "/")
          opened[name] = ts.open(
            {"driver": driver, "kvstore": store}, read=True
          ).result()
    if not opened:
      raise ValueError(f"Expected arrays of a `target`, got {keys[:3]}")
    size = sum(math.prod(array.shape) * 4 for array in opened.values())
    stored = sum(
      file.stat().st_size for file in folder.rglob("*") if file.is_file()
    )
    # before memory is taken for them
    if size > _SMALL + _MOST_COMPRESSION * stored:
      raise ValueError(
        f"Expected arrays that their files hold, got {stored} bytes for {size}"
      )
    # All reads are under way before the first is waited for.
    reads = {name: array.read() for name, array in opened.items()}
    return {name: read.result() for name, read in reads.items()}
