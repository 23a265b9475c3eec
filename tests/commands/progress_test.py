"""Which step it is, how far, and how much is left."""

import io

from rich import console as rich_console
from rich import progress as rich_progress

from calm.console import Steps, announced_steps


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_the_time_left_counts_steps_that_work_only():
  file, clock = io.StringIO(), Clock()
  bar = rich_progress.Progress(console=rich_console.Console(file=file, width=80))
  steps = Steps(bar, clock)
  steps.expect(6)
  steps("read from a file")  # never reports: it was there already
  slow = steps("slow [/b]")
  clock.now = 30.0
  slow(0.5, "half of it")
  assert file.getvalue() == "[2/6] slow [/b], about 4:30 left\n"  # half a step and four more
  assert steps.left(2, 1.0) == "2:00"  # 30 s for a whole step, and four are left
  clock.now = 60.0
  quick = steps("quick")
  quick(1.0, "all of it")
  assert file.getvalue().splitlines()[1] == "[3/6] quick, about 1:30 left"


def test_nothing_is_said_before_anything_is_known():
  bar = rich_progress.Progress(console=rich_console.Console(file=io.StringIO()))
  clock = Clock()
  steps = Steps(bar, clock)
  report = steps("first")
  assert steps.left(1, 0.0) == ""
  report(0.1, "x")
  clock.now = 1.0
  steps.expect(4)
  assert steps.left(1, 0.1) == ""  # a second tells little
  clock.now = 10.0
  assert steps.left(1, 0.1) == "6:30"


def test_where_there_is_no_terminal_a_bar_leaves_nothing():
  """rich ends one with an empty line, before an error too."""
  file = io.StringIO()
  with announced_steps(rich_console.Console(file=file)):
    pass
  assert file.getvalue() == ""


def test_a_narrow_terminal_cuts_what_is_done_and_not_the_time_that_is_left(monkeypatch):
  clock, file = Clock(), io.StringIO()
  console = rich_console.Console(file=file, width=60, force_terminal=True)
  with announced_steps(console) as steps:
    monkeypatch.setattr(steps, "_clock", clock)
    steps.expect(6)
    report = steps("summaries: copied projections")
    clock.now = 30.0
    report(0.5, "softmax at threshold 0.4, a long text that has no room")
  assert "about 5:30 left" in file.getvalue()
