"""Progress with what it counts, its rate and the time left: a bar, or lines where none fits."""

import contextlib
import time
from collections.abc import Iterator

from rich import console as rich_console
from rich import progress as rich_progress

# Between two lines where there is no terminal.
LINE_SECONDS = 15.0


class Counter:
  """Counts things that are done; made by `counting`."""

  def __init__(self, bar: rich_progress.Progress, total: int, things: str, done: int):
    self._bar, self._total, self._things = bar, total, things
    self._first = self._done = done
    self._idle, self._start = 0.0, time.monotonic()
    self._told = self._start
    self._task = bar.add_task("", total=total, completed=done, text=self._text())

  def add(self, count: int, idle_seconds: float = 0.0) -> None:
    """Things were done; `idle_seconds` of the time went to something else, like compiling."""
    self._done += count
    self._idle += idle_seconds
    self._bar.update(self._task, completed=self._done, text=self._text())
    now = time.monotonic()
    waited = now - self._told >= LINE_SECONDS and self._done < self._total
    if waited and not self._bar.console.is_terminal:
      self._told = now
      self._bar.console.print(self._text(), highlight=False)

  @contextlib.contextmanager
  def hidden(self) -> Iterator[None]:
    """Takes the bar off the screen for what is printed in the block."""
    self._bar.stop()
    try:
      yield
    finally:
      self._bar.start()

  def _text(self) -> str:
    text = f"{self._done} of {self._total} {self._things}"
    made = self._done - self._first
    seconds = time.monotonic() - self._start - self._idle
    if not made or seconds <= 0:
      return text
    left = (self._total - self._done) * seconds / made
    return f"{text}, {rate(made, seconds)}, {clock(left)} left"


def rate(count: int, seconds: float) -> str:
  """Like `12 a second`, or `4.1 a minute` where that is clearer."""
  each = count / max(seconds, 1e-9)
  per, unit = (each, "second") if each >= 1 else (60 * each, "minute")
  return f"{per:.0f} a {unit}" if per >= 10 else f"{per:.1f} a {unit}"


def clock(seconds: float) -> str:
  """Like `1:05` or `2:01:05`."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def counting(
  console: rich_console.Console, total: int, things: str, *, done: int = 0
) -> Iterator[Counter]:
  """A counter on the screen while the block runs; nothing of it stays there.

  Args:
    console: where to.
    total: things there are.
    things: what they are called, like 'prompts'.
    done: those done before.
  """
  columns = (
    rich_progress.BarColumn(bar_width=20),
    rich_progress.TextColumn("{task.fields[text]}", markup=False),
  )
  with bar(console, *columns) as shown:
    yield Counter(shown, total, things, done)


def bar(
  console: rich_console.Console, *columns: rich_progress.ProgressColumn, expand: bool = False
) -> rich_progress.Progress:
  """A bar of which nothing stays; where there is no terminal, not even an empty line."""
  return rich_progress.Progress(
    *columns,
    console=console,
    transient=True,
    disable=not console.is_terminal,
    expand=expand,
  )
