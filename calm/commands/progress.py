"""Progress of a command with many steps: which it is, how far, and about how much is left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table

from calm.calibrate import screen, showing
from calm.calibrate.generations.shown import visible

LEAST_SECONDS = 2.0

Report = Callable[[float, str], None]


class Steps:
  """Announces steps; made by `steps`.

  Steps that were done in an earlier run take no time, so that only those that report progress
  count for the time that is left.
  """

  def __init__(self, bar: rich_progress.Progress, clock: Callable[[], float] = time.monotonic):
    self._bar, self._clock = bar, clock
    self._task = bar.add_task("", total=1.0, visible=False, left="")
    self._expected = self._announced = self._worked = 0
    self._first: float | None = None

  def expect(self, count: int) -> None:
    """Says how many steps there are about to be."""
    self._expected = count

  def __call__(self, text: str) -> Report:
    """The next step; its report takes the share done in [0, 1] and what is being done."""
    self._announced += 1
    number, told = self._announced, self._bar.console.is_terminal
    start, counted = self._clock(), False
    self._bar.reset(self._task, total=1.0, description="", visible=False)

    def report(share: float, what: str) -> None:
      nonlocal told, counted
      if not counted:
        counted = True
        self._worked += 1
        self._first = start if self._first is None else self._first
      left = self.left(number, share)
      if not told:
        told = True
        line = f"{self._place(number)} {text}{f', about {left} left' if left else ''}"
        screen.say(self._bar.console, line)
      self._bar.update(
        self._task,
        completed=share,
        description=visible(f"{self._place(number)} {text} · {what}"),
        left=f"about {left} left" if left else "",
        visible=True,
      )

    return report

  def left(self, number: int, share: float) -> str:
    """About how long all of it still takes, like `12:30`; '' before anything is known."""
    done = self._worked - 1 + share
    if self._first is None or done <= 0 or self._expected < number:
      return ""
    spent = self._clock() - self._first
    if spent < LEAST_SECONDS:  # too early to tell
      return ""
    each = spent / done
    return showing.clock(each * (self._expected - number + 1 - share))

  def _place(self, number: int) -> str:
    return f"[{number}/{max(number, self._expected)}]" if self._expected else f"[{number}]"


@contextlib.contextmanager
def steps(console: rich_console.Console) -> Iterator[Steps]:
  """A bar for the step at work, or a line a step where there is no terminal."""
  columns = (
    rich_progress.BarColumn(bar_width=12),
    rich_progress.TextColumn("{task.fields[left]}", markup=False),
    # What is left of the line: the time that is left is not cut for it.
    rich_progress.TextColumn(
      "{task.description}", markup=False, table_column=rich_table.Column(ratio=1, no_wrap=True)
    ),
  )
  with showing.bar(console, *columns, expand=True) as bar:
    yield Steps(bar)
