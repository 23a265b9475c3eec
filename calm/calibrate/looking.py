"""Progress for whoever calls from Python: a line with the time left, where someone looks on.

The commands show their own progress; what they call is `quiet`.
"""

import contextlib
import contextvars
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich import console as rich_console
from rich import progress as rich_progress

from calm.calibrate import screen, showing
from calm.calibrate.generations.shown import visible

# Told the share done in [0, 1], and of what.
Report = Callable[[float, str], None]

# What is done sooner shows nothing.
LEAST_SECONDS = 2.0
# Between two looks of a notebook, which keeps every one of them for a while.
NOTEBOOK_SECONDS = 0.5

_told: contextvars.ContextVar[bool] = contextvars.ContextVar("told", default=False)


class View(Protocol):
  """A place where one line of progress is seen."""

  def start(self) -> None: ...
  def show(self, share: float, text: str) -> None: ...
  def stop(self) -> None: ...


class Terminal:
  """A bar with a text, of which nothing stays."""

  def __init__(self, console: rich_console.Console):
    columns = (
      rich_progress.BarColumn(bar_width=20),
      rich_progress.TextColumn("{task.fields[text]}", markup=False),
    )
    self._bar = showing.bar(console, *columns)
    self._task = self._bar.add_task("", total=1.0, text="")
    self.start, self.stop = self._bar.start, self._bar.stop

  def show(self, share: float, text: str) -> None:
    """The share done in [0, 1], and what is being done."""
    self._bar.update(self._task, completed=share, text=visible(text))


class Notebook:
  """One line that is replaced; what it said last stays with the cell."""

  def __init__(self):
    self._handle: Any = None
    self._text, self._drawn = "", float("-inf")

  def start(self) -> None:
    """Makes the line."""
    self._handle = importlib.import_module("IPython.display").DisplayHandle()
    self._handle.display(self._data(), raw=True)

  def show(self, share: float, text: str) -> None:
    """The share done in [0, 1], and what is being done."""
    self._text = f"{100 * share:.0f} %, {visible(text)}"
    now = time.monotonic()
    if self._handle is not None and now - self._drawn >= NOTEBOOK_SECONDS:
      self._drawn = now
      self._handle.update(self._data(), raw=True)

  def stop(self) -> None:
    """Says what was told last."""
    if self._handle is not None:
      self._handle.update(self._data(), raw=True)

  def _data(self) -> dict[str, str]:
    return {"text/plain": self._text or "begun ..."}


class Lines:
  """A line now and then, for files and pipes."""

  def __init__(self, console: rich_console.Console):
    self._console, self._told = console, time.monotonic()

  def start(self) -> None:
    """Nothing yet."""

  def show(self, share: float, text: str) -> None:
    """The share done in [0, 1], and what is being done."""
    now = time.monotonic()
    if now - self._told >= showing.LINE_SECONDS:
      self._told = now
      screen.say(self._console, f"  {100 * share:.0f} %, {text}", soft_wrap=True)

  def stop(self) -> None:
    """Nothing more."""


def view(console: rich_console.Console) -> View:
  """What progress looks like there."""
  if console.is_jupyter:
    return Notebook()
  return Terminal(console) if console.is_terminal else Lines(console)


class Left:
  """How long the rest takes, judged by what was done since the first report above 0.

  Before that it compiled, or an earlier run did it.
  """

  def __init__(self):
    self._begun: tuple[float, float] | None = None

  def __call__(self, share: float) -> str:
    """Like `about 1:20 left`; '' before anything is known.

    Args:
      share: done by now, in [0, 1].
    """
    now = time.monotonic()
    if self._begun is None and share > 0.0:
      self._begun = (share, now)
    if self._begun is None:
      return ""
    done, seconds = share - self._begun[0], now - self._begun[1]
    if done < 0.03 or seconds < LEAST_SECONDS or share >= 1.0:
      return ""
    return f"about {showing.clock(seconds * (1.0 - share) / done)} left"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """What runs in the block shows no progress of its own: somebody else does."""
  token = _told.set(True)
  try:
    yield
  finally:
    _told.reset(token)


@contextlib.contextmanager
def looking(console: rich_console.Console | None = None) -> Iterator[Report]:
  """Shows what the block reports on standard error, where that is a terminal or a notebook.

  Nothing of it is seen before `LEAST_SECONDS`, nor in a block that is told by another.
  """
  console = console or rich_console.Console(file=sys.stderr)
  if _told.get() or not (console.is_terminal or console.is_jupyter):
    yield lambda share, text: None
    return
  seen, left = view(console), Left()

  def report(share: float, text: str) -> None:
    rest = left(share)
    seen.show(share, f"{text}, {rest}" if rest else text)

  timer = threading.Timer(LEAST_SECONDS, seen.start)
  timer.daemon = True
  timer.start()
  try:
    with quiet():
      yield report
  finally:
    timer.cancel()
    timer.join()
    seen.stop()


@contextlib.contextmanager
def counting(things: str) -> Iterator[Callable[[int, int], None]]:
  """`looking` for what is told as (done, total) of things, like 'prompts'."""
  with looking() as report:
    yield lambda done, total: report(done / max(total, 1), f"{done} of {total} {things}")
