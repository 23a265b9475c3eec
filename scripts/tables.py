"""Writes the tables of every README from `scripts/results/*.json`: no figure is
typed.

  python scripts/tables.py            writes them
  python scripts/tables.py --check    says which would change, and exits with 1
  if one would

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and comes from
`scripts/results/NAME.json`: {"command", "columns", "rows", "versions",
"machine"?, "align"?}. A row is a list of cells, or an object with the columns
as keys. `<!-- table: NAME rows: 1 3 -->` shows some of the rows, counted from
1, and after it `columns: model; task` some of the columns of rows that are
objects.
"""

import argparse
import contextlib
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import calm
from calm import storage

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
MARK = re.compile(
  r"(<!-- table: ([\w-]+)(?: rows: ([\d ]+))?(?: columns: (.+?))? "
  r"-->\n).*?(<!-- end -->)",
  re.DOTALL,
)


def readmes() -> list[pathlib.Path]:
  """Every README of the repository, environments and runs left out."""
  folders = ("", "calm", "configs", "scripts", ".github")
  found = [ROOT / "README.md"]
  for folder in folders[1:]:
    found += sorted((ROOT / folder).rglob("*.md"))
  return [path for path in found if path.is_file()]


def cell(value: Any) -> str:
  """A value as the table shows it: three digits of a float, nothing of None."""
  if value is None:
    return ""
  if isinstance(value, float):
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
  return str(value).replace("|", "\\|")


def table(result: dict[str, Any]) -> str:
  """A result as Markdown, with the command and the versions that it was made
  with.

  Raises:
    KeyError: the result lacks `command`, `columns` or `rows`.
  """
  columns = [str(column) for column in result["columns"]]
  rows = [
    [row.get(column) for column in columns] if isinstance(row, dict) else row
    for row in result["rows"]
  ]
  numeric = [
    all(not isinstance(row[i], str) for row in rows)
    for i in range(len(columns))
  ]
  align = result.get("align") or [
    "right" if right else "left" for right in numeric
  ]

  def line(cells):
    return "| " + " | ".join(cells) + " |"

  rule = line(["---:" if side == "right" else "---" for side in align])
  body = [line([cell(value) for value in row]) for row in rows]
  versions = ", ".join(
    f"{name} {version}" for name, version in result["versions"].items()
  )
  about = "; ".join(part for part in (result.get("machine"), versions) if part)
  source = f"<sub>{about}. `{result['command']}`</sub>"
  return "\n".join([line(columns), rule, *body, "", source])


def rendered(text: str) -> str:
  """A README's text with its tables made anew."""

  def replace(match: re.Match[str]) -> str:
    result = json.loads((RESULTS / f"{match[2]}.json").read_text("utf-8"))
    if match[3]:
      result["rows"] = [
        result["rows"][int(number) - 1] for number in match[3].split()
      ]
    if match[4]:
      result["columns"] = match[4].split("; ")
    return f"{match[1]}{table(result)}\n{match[5]}"

  return MARK.sub(replace, text)


def command_line() -> str:
  """The command that runs, by its script's name, without where results are
  written to.
  """
  words = ["python", f"scripts/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]
  return re.sub(r" --output[ =]\S+", "", shlex.join(words))


def versions(*packages: str) -> dict[str, str]:
  """Versions of this package and of others, those that are installed."""
  found = {"calm": calm.__version__}
  for name in packages:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found


def write(
  path: str | pathlib.Path,
  columns: Sequence[str],
  rows: Sequence[Any],
  *,
  machine: str = "",
  packages: Sequence[str] = ("numpy", "scipy"),
  **more: Any,
) -> dict[str, Any]:
  """Writes and returns a result; `more` are other keys, like `align` and more
  `versions`.
  """
  known = versions(*packages) | more.pop("versions", {})
  about = {
    "command": command_line(),
    "columns": list(columns),
    **more,
    "rows": list(rows),
  }
  result = about | {"machine": machine, "versions": known}
  storage.write_atomically(
    pathlib.Path(path), json.dumps(result, indent=1, ensure_ascii=False) + "\n"
  )
  return result


def main(arguments: list[str] | None = None) -> int:
  """Writes or checks every README; returns the process's exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="write nothing")
  flags = parser.parse_args(arguments)
  stale = []
  for path in readmes():
    old = path.read_text("utf-8")
    new = rendered(old)
    if new != old:
      stale.append(path.relative_to(ROOT).as_posix())
      if not flags.check:
        storage.write_atomically(path, new)
  print("\n".join(stale) or "every table is up to date")
  return int(flags.check and bool(stale))


if __name__ == "__main__":
  sys.exit(main())
