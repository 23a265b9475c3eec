"""How a fit looks on a screen: the step at work, and how long it still takes."""

import io
import types

import pytest
from rich import console as rich_console

from calm import fitting
from calm.console import Notebook, time
from calm.fitting import run


@pytest.fixture
def now(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  return now


def test_the_time_left_counts_neither_compiling_nor_an_earlier_run(now):
  written = io.StringIO()
  with fitting.on_screen(rich_console.Console(file=written, width=80)) as listener:
    now[0] = 60.0
    progress = listener.step("[1/2] Train stage one")
    for at, share, text in ((90, 0.0, "compiling"), (110, 0.5, "step 5"), (130, 0.6, "step 6")):
      now[0] = float(at)
      progress(share, text)
  lines = [line.strip() for line in written.getvalue().splitlines() if "%" in line]
  assert lines == [  # none of the step's beginning, which its title says
    "0 %, [1/2] compiling",
    "50 %, [1/2] step 5",
    "60 %, [1/2] about 1:20 left, step 6",
  ]


def test_the_time_left_is_seen_on_sixty_columns(now):
  written = io.StringIO()
  console = rich_console.Console(file=written, width=60, force_terminal=True)
  with fitting.on_screen(console) as listener:
    progress = listener.step("[4/6] Choose measure, layers and grid")
    for share in (0.2, 0.4):
      now[0] += 30.0
      progress(share, "classifier after layer 1, decaying with tau 4, threshold 0.8257")
  assert "about 1:30 left, " in written.getvalue()


def test_from_python_a_fit_tells_standard_error_and_a_listener_takes_its_place(
  monkeypatch, tmp_path, capsys
):
  def opened(model, train, output, options, listener):
    def work():
      listener.step("[1/1] Work")(0.5, "half of it")
      listener.say("Done.")

    return types.SimpleNamespace(run=work)

  monkeypatch.setattr(run.Fit, "open", opened)
  fitting.fit("packed", [], output=tmp_path / "a")
  assert capsys.readouterr() == ("", "[1/1] Work ...\nDone.\n")
  said = []
  fitting.fit("packed", [], output=tmp_path / "b", listener=fitting.Listener(say=said.append))
  assert capsys.readouterr() == ("", "") and said == ["Done."]


def test_what_stays_in_a_notebook_is_that_it_is_done(monkeypatch):
  seen = []

  class View(Notebook):
    start = stop = lambda self: None
    show = lambda self, share, text: seen.append((share, text))

  monkeypatch.setattr(looking, "view", lambda console: View())
  with fitting.on_screen(rich_console.Console(file=io.StringIO())) as listener:
    listener.step("[1/1] Work")(0.5, "half of it")
  assert seen == [(0.0, "[1/1]"), (0.5, "[1/1] half of it"), (1.0, "done")]
