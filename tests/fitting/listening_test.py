"""How a fit looks on a screen: the step at work, and how long it still takes."""

import io
import types

import pytest
from rich import console as rich_console

from calm import fitting
from calm.console import Progress, time
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
    "60 %, about 1:20 left, [1/2] step 6",
  ]


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
  monkeypatch.setattr(Progress, "__call__", lambda self, *report: seen.append(report))
  with fitting.on_screen(rich_console.Console(file=io.StringIO())) as listener:
    listener.step("[1/1] Work")(0.5, "half of it")
  assert seen == [(0.5, "[1/1] half of it"), (1.0, "done")]
