"""Tables on terminals of any width."""

import io

import pytest
from rich import console as rich_console

from calm.console import print_table, print_text

HEADS = ("threshold", "mean loss", "upper bound", "p-value", "certified", "layers / token")
ROWS = (
  ("0.95", "0.0005", "0.0130", "2.1e-11", "yes", "7.33"),
  ("0.9", "0.0190", "0.0421", "1.3e-05", "no", "4.33"),
)


def printed(width, rows=ROWS, **options):
  file = io.StringIO()
  console = rich_console.Console(file=file, width=width)
  print_table(console, HEADS, rows, **options)
  return file.getvalue()


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20])
def test_nothing_is_cut_and_nothing_wraps_into_noise(width):
  text = printed(width, title="textual loss", words=0)
  lines = text.splitlines()
  assert max(map(len, lines)) <= width and "…" not in text
  for row in ROWS:
    for cell in row:
      assert cell in text
  if width >= 60:  # a row is a line
    assert any(all(cell in line for cell in ROWS[0]) for line in lines)
  else:
    assert any(line.startswith("0.95: mean loss") for line in lines)


def test_the_chosen_row_stands_out_and_cells_are_text():
  file = io.StringIO()
  console = rich_console.Console(file=file, width=80, force_terminal=True)
  print_table(console, ("a", "b"), (("[/b]", ":smile:"), ("\x1b[2J", "x")), bold=0)
  text = file.getvalue()
  assert "[/b]" in text and ":smile:" in text and r"\x1b[2J" in text
  assert text.count("\x1b[1m") >= 2


def test_sections_part_groups_of_rows():
  rows = (("a", "1"), ("a", "2"), ("b", "1"))
  file = io.StringIO()
  console = rich_console.Console(file=file, width=80)
  print_table(console, ("task", "n"), [(*row, "x") for row in rows][:0], words=1)
  print_table(console, ("task", "n", "x"), [(*row, "x") for row in rows], words=2)
  assert file.getvalue().count("├") == 1


def test_what_is_said_does_nothing_to_the_terminal():
  file = io.StringIO()
  console = rich_console.Console(file=file, width=20, force_terminal=True)
  print_text(console, "[bold]:smile:\x1b[2J", "bold")
  assert file.getvalue() == "\x1b[1m[bold]:smile:\\x1b[2J\x1b[0m\n"
  file.truncate(0), file.seek(0)
  print_text(console, "a path of more than twenty letters", soft_wrap=True)
  assert file.getvalue() == "a path of more than twenty letters\n"
