"""A page with its figures and tables as files."""

import pathlib

from calm import storage
from calm.paper.report import page as page_lib


def write(output: pathlib.Path, page: page_lib.Page) -> str:
  """Writes index.html, figures/ and tables/; returns what was written, in words.

  Raises:
    OSError: a file cannot be written.
  """
  figures = [figure for section in page.sections for figure in section.figures]
  tables = [table for section in page.sections for table in section.tables]
  for folder in ("figures", "tables"):
    (output / folder).mkdir(parents=True, exist_ok=True)
  for figure in figures:
    storage.write_atomically(output / "figures" / f"{figure.name}.svg", figure.svg)
    storage.write_atomically(output / "figures" / f"{figure.name}.png", figure.png)
  for table in tables:
    storage.write_atomically(output / "tables" / f"{table.name}.csv", table.csv)
    storage.write_atomically(output / "tables" / f"{table.name}.md", table.markdown)
  storage.write_atomically(output / "index.html", page_lib.render(page))
  return f"{len(figures)} figures, {len(tables)} tables and one page are in {output}"
