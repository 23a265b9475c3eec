"""What a run leaves on disk: checkpoints through Orbax, whole or not at all."""

import pathlib
from typing import Any

import jax

from calm import arguments, storage


@arguments.checked()
def check_writable(output_dir: pathlib.Path) -> None:
  """Makes the folder, and refuses one that nothing can be written to before hours are spent.

  Raises:
    OSError: says which folder, and what to do.
  """
  try:
    output_dir.mkdir(parents=True, exist_ok=True)
    with storage.temporary(output_dir / "writable"):
      pass
  except OSError as error:
    raise type(error)(
      f"Expected `output_dir` to be a folder that can be written, got {str(output_dir)!r}"
      f" ({error.strerror}); choose another or change its permissions."
    ) from error


def checkpointer(output_dir: pathlib.Path, name: str = "checkpoints", max_to_keep: int = 1):
  """An Orbax manager of one folder of the run; checkpoints appear whole or not at all."""
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(
    max_to_keep=max_to_keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
  )
  return ocp.CheckpointManager(
    (output_dir / name).absolute(),
    options=options,
    item_handlers=ocp.StandardCheckpointHandler(),
  )


def save(manager, step: int, tree: Any) -> None:
  import orbax.checkpoint as ocp

  manager.save(step, args=ocp.args.StandardSave(tree), force=True)
  manager.wait_until_finished()


def restore(manager, step: int, like: Any) -> Any:
  """The checkpoint of a step, with the structure and shapes of `like`.

  Raises:
    ValueError: it holds another structure or other shapes.
  """
  import orbax.checkpoint as ocp

  # Orbax reads all leaves at once, and leaves the other reads behind at the first misfit.
  stored, expected = _shapes(manager.item_metadata(step)), _shapes(like)
  misfits = [path for path in expected if stored.get(path) != expected[path]]
  if misfits:
    path = misfits[0]
    raise ValueError(
      f"Expected {str(manager.directory)!r} to hold a run of this model and optimizer, with"
      f" {path!r} of shape {expected[path]}, got {stored.get(path, 'none')} at step {step};"
      " give another `output_dir`, or the configuration that it was started with."
    )
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{path: shape} of a tree or of Orbax's description of one."""
  leaves, _ = jax.tree.flatten_with_path(getattr(tree, "tree", tree))
  named = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {named(path): tuple(leaf.shape) for path, leaf in leaves}
