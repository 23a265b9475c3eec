"""Files that are never seen half written."""

import contextlib
import hashlib
import os
import pathlib


def write_atomically(path: str | pathlib.Path, text: str) -> None:
  """Writes a text file under a temporary name and renames it: no half file is ever seen."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise OSError(
      f"cannot write {path} ({error.strerror}); choose a folder that can be written."
    ) from error


def checksum(path: str | pathlib.Path) -> str:
  """SHA-256 (hexadecimal) of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
