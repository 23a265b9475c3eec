"""Where the gin files of `configs/` lie: beside the package, or inside it once installed.

python -m calm.training.configs      # prints the folder, for `--gin_search_paths`
"""

import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def root() -> pathlib.Path:
  """The folder that holds `configs/`, which `include "configs/..."` is written from.

  Raises:
    FileNotFoundError: this copy of the package has none.
  """
  for folder in (PACKAGE, PACKAGE.parent):
    if (folder / "configs" / "runs").is_dir():
      return folder
  raise FileNotFoundError(
    f"Expected `configs/` in or beside {str(PACKAGE)!r}, got none; install the package whole,"
    " or run from its repository."
  )


if __name__ == "__main__":
  print(root())
