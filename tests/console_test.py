"""Progress from Python: seen where someone looks on and it takes long, and nowhere else."""

import io
import sys
import threading
import time
import types

import pytest
from rich import console as rich_console

from calm import console as console_module
from calm.console import (
  LINE_SECONDS,
  NOTEBOOK_SECONDS,
  EtaEstimator,
  progress_view,
  quiet,
  show_count,
  show_progress,
)


@pytest.fixture
def now(monkeypatch):
  """A clock, and a timer that rings at once where `LEAST_SECONDS` have gone by."""
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


@pytest.fixture
def at_once(monkeypatch):
  monkeypatch.setattr(console_module, "LEAST_SECONDS", 0.0)


def terminal():
  return rich_console.Console(file=io.StringIO(), width=80, force_terminal=True)


def begin(report, share=0.0):
  """The first report, and the moment in which it is seen."""
  report(share, "begun")
  for thread in threading.enumerate():
    if isinstance(thread, threading.Timer):
      thread.join(10.0)


class Cell:
  """What a notebook's front end shows of one `display_id`."""

  def __init__(self):
    self.seen = []

  def display(self, data, *, raw):
    assert raw
    self.seen.append(data["text/plain"])

  update = display


@pytest.fixture
def notebook(monkeypatch):
  """IPython with one cell, and a console that takes itself for a notebook's."""
  cell = Cell()
  for name in ("IPython", "IPython.display"):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(DisplayHandle=lambda: cell))
  return cell, rich_console.Console(file=io.StringIO(), force_jupyter=True)


def test_a_terminal_sees_how_far_it_is_and_how_much_is_left(now, at_once):
  console = terminal()
  with show_progress(console) as report:
    begin(report, 0.1)
    now[0] = 40.0
    report(0.5, "5 of 10 prompts")
  shown = console.file.getvalue()
  assert "5 of 10 prompts, about 0:50 left" in shown
  assert shown.endswith("\x1b[2K")  # nothing of it stays


def test_what_is_quick_shows_nothing():
  console = terminal()
  with show_progress(console) as report:
    report(0.5, "half of it")
  assert console.file.getvalue() == ""


def test_files_and_pipes_get_nothing(at_once, capsys):
  with show_progress() as report:
    begin(report)
  assert capsys.readouterr() == ("", "")


def test_things_are_counted(at_once, monkeypatch):
  console = terminal()
  monkeypatch.setattr(rich_console, "Console", lambda **options: console)
  with show_count("prompts") as told:
    told(0, 0)
    told(3, 12)
    begin(lambda share, text: None)
  assert "3 of 12 prompts" in console.file.getvalue()


def test_what_another_tells_of_is_told_once(at_once):
  outer, inner = terminal(), terminal()
  with show_progress(outer) as report:
    begin(report)
    with show_progress(inner) as within:
      begin(within)
  with quiet(), show_progress(inner) as within:
    begin(within)
  assert "begun" in outer.file.getvalue() and inner.file.getvalue() == ""
  with show_progress(inner) as report:  # later, by itself
    begin(report)
  assert "begun" in inner.file.getvalue()


def test_a_failure_leaves_no_bar(at_once):
  console = terminal()
  with pytest.raises(RuntimeError), show_progress(console) as report:
    begin(report)
    raise RuntimeError
  assert console.file.getvalue().endswith("\x1b[2K")
  assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


def test_a_notebook_has_one_line_that_changes(now, at_once, notebook):
  cell, console = notebook
  with show_progress(console) as report:
    begin(report)
    for second in range(1, 41):
      now[0] = second / 4
      report(second / 40, f"{second} of 40 prompts")
  assert cell.seen[0] == "begun ..."
  assert len(cell.seen) <= 3 + 40 / 4 / NOTEBOOK_SECONDS  # not each report
  assert "50 %, 20 of 40 prompts, about 0:05 left" in cell.seen
  assert cell.seen[-1] == "100 %, 40 of 40 prompts"


def test_a_notebook_sees_nothing_of_what_is_quick(notebook):
  cell, console = notebook
  with show_progress(console) as report:
    report(1.0, "done")
  assert not cell.seen


def test_a_file_gets_a_line_now_and_then(now):
  file = io.StringIO()
  lines = progress_view(rich_console.Console(file=file, width=80))
  lines.start()
  for second in range(1, 41):
    now[0] = float(second)
    lines.show(second / 40, f"step {second}")
  lines.stop()
  assert file.getvalue().split("\n") == ["  38 %, step 15", "  75 %, step 30", ""]
  assert LINE_SECONDS == 15.0


def test_nothing_is_left_of_what_is_done_or_hardly_begun(now):
  left = EtaEstimator()
  assert left(0.0) == left(0.01) == ""
  now[0] = 10.0
  assert left(0.02) == "" and left(0.21) == "about 0:40 left" and left(1.0) == ""
