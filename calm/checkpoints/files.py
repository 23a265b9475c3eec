"""The files of checkpoints: safetensors and JSON, checked when read, written
together.
"""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by it)
import numpy as np
import safetensors
import safetensors.numpy

from calm import storage
from calm.calibrate import checks

_MOST_JSON = 2**26
# The types that a parameter may be stored as; all are read as float32.
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def as_float32(name: str, array: Any, path: pathlib.Path) -> np.ndarray:
  """A stored leaf as float32; ValueError where it is not floating point."""
  array = np.asarray(array)
  if array.dtype.name not in _FLOATS:
    raise ValueError(
      f"Expected the leaves of {str(path)!r} to be of {', '.join(_FLOATS)}, got"
      f" {array.dtype.name} for {name!r}; give an unquantised checkpoint."
    )
  return array.astype(np.float32)


def read_safetensors(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """All arrays of a safetensors file, as float32, and the texts in its header.

  FileNotFoundError or ValueError where it is missing, truncated, names a tensor
  twice, or holds other than floats.
  """
  _check_file(path)

  def unique(pairs: list[tuple[str, Any]]) -> None:
    twice = checks.repeated([name for name, _ in pairs])
    if twice:  # the last would be read
      raise ValueError(
        f"Expected {str(path)!r} to name every tensor once, got {twice[:5]} "
        "twice."
      )

  try:
    with (
      safetensors.safe_open(path, framework="numpy") as file,
      path.open("rb") as header,
    ):
      size = int.from_bytes(header.read(8), "little")
      json.loads(header.read(size), object_pairs_hook=unique)
      names = file.keys()
      arrays = {
        name: as_float32(name, file.get_tensor(name), path) for name in names
      }
      return arrays, file.metadata() or {}
  except safetensors.SafetensorError as error:
    message = (
      f"Expected `path` to be a whole safetensors file, got {str(path)!r} "
      f"({error})."
    )
    raise ValueError(message) from error


def _check_file(path: pathlib.Path) -> None:
  if not path.is_file():
    raise FileNotFoundError(
      f"Expected `path` to hold {path.name!r}, got {str(path)!r}, missing."
    )


def safetensors_writer(
  tensors: Mapping[str, np.ndarray],
  storage_dtype: str = "float32",
  **metadata: str,
) -> Callable[[pathlib.Path], Any]:
  """A writer for `write_together`; the arrays are cast to float32 or
  bfloat16.
  """
  # safetensors writes the memory as it lies, so transposed views must be laid
  # out anew.
  cast = {
    name: np.ascontiguousarray(np.asarray(array).astype(storage_dtype))
    for name, array in tensors.items()
  }

  def write(path: pathlib.Path) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    safetensors.numpy.save_file(cast, path, metadata=metadata or None)
    # safetensors puts a file of its own there, which nobody but its writer may
    # read.
    os.chmod(path, mode)

  return write


def json_writer(value: Any) -> Callable[[pathlib.Path], Any]:
  """A writer for `write_together`: indented JSON."""
  text = json.dumps(value, indent=2) + "\n"
  return lambda path: path.write_text(text, encoding="utf-8")


def read_json(
  path: pathlib.Path, missing: dict[str, Any] | None = None
) -> dict[str, Any]:
  """A JSON object; `missing`, or FileNotFoundError, where there is no such
  file.
  """
  if missing is not None and not path.exists():
    return missing
  _check_file(path)
  try:
    value = storage.parse_json(storage.content(path, _MOST_JSON))
    if not isinstance(value, dict):
      raise ValueError(f"no JSON object, got {type(value).__name__}")
  except ValueError as error:
    raise ValueError(
      f"Expected {str(path)!r} to be JSON in UTF-8, got: {error}."
    ) from error
  return value


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """Within the block, a ValueError names the file."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def write_together(
  directory: pathlib.Path, writers: Mapping[str, Callable[[pathlib.Path], Any]]
) -> None:
  """Writes several files of one directory under temporary names, then renames
  them in order.

  A full disk or a kill leaves an earlier checkpoint as it was, with an OSError.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      whole = []
      for name, write in writers.items():
        target = storage.destination(directory / name)
        if target is None:
          raise PermissionError(None, f"{name} is there and is no regular file")
        partial = stack.enter_context(storage.temporary(target))
        write(partial)
        whole.append((partial, target))
      for partial, target in whole:
        storage.put(partial, target)
  except (OSError, safetensors.SafetensorError) as error:
    raise OSError(
      "Expected `directory` to be a folder that can be written, got "
      f"{str(directory)!r}"
      f" ({getattr(error, 'strerror', None) or error}); choose another or "
      "free some space."
    ) from error
