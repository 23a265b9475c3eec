"""Text, tables and progress on a console: terminals, notebooks, pipes and files.

Text of others is sanitized: nothing in it moves the cursor, colours or turns what follows.
Where a table's columns do not fit, each row is some lines of words.
"""

import contextlib
import contextvars
import importlib
import re
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from rich import box as rich_box
from rich import console as rich_console
from rich import measure as rich_measure
from rich import progress as rich_progress
from rich import table as rich_table
from rich import text as rich_text

# Other (control, format, surrogate, private, unassigned) and separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # letters of Persian, Hindi and others need them


def sanitize(text: object) -> str:
  """A text as one can look at it safely: control and direction marks as their escapes.

  Ends of lines and tabs stay. `\\x1b[31m` is shown as it is written here, and does nothing.
  """
  return "".join(
    c.encode("unicode_escape").decode()
    if unicodedata.category(c) in _HIDDEN and c not in "\n\t" + _JOINERS
    else c
    for c in str(text)
  )


def print_text(
  console: rich_console.Console, text: object, style: str = "", *, soft_wrap: bool = False
) -> None:
  """Prints a text of others as it is: no markup, no emoji codes, no control characters.

  Args:
    console: where to.
    text: anything; see `sanitize`.
    style: of all of it.
    soft_wrap: whether the terminal folds long lines, so that they can be copied.
  """
  console.print(rich_text.Text(sanitize(text), style), soft_wrap=soft_wrap)


def print_table(
  console: rich_console.Console,
  heads: Sequence[str],
  rows: Sequence[Sequence[str]],
  *,
  title: str = "",
  words: int = 1,
  bold: int | None = None,
) -> None:
  """Prints a table; what others wrote in it is shown and does nothing.

  Heads break between words where that makes room, then lines between columns go, and in the
  end every row becomes a paragraph.

  Args:
    console: where to.
    heads: of the columns.
    rows: cells, as many as heads in each.
    title: above the table.
    words: columns that hold words, aligned left, from the first on; the last of them does not
      repeat, the others part the table where they change.
    bold: position of a row that stands out.
  """
  stacked = [re.sub(r" (?!/)", "\n", head) for head in heads]
  for names, box in (
    (heads, rich_box.HEAVY_HEAD),
    (stacked, rich_box.HEAVY_HEAD),
    (stacked, rich_box.SIMPLE_HEAD),
  ):
    table = _table(names, rows, title, words, bold, box)
    anywhere = console.options.update(width=10_000)
    if rich_measure.Measurement.get(console, anywhere, table).maximum <= console.width:
      console.print(table)
      return
  if title:
    console.print(rich_text.Text(sanitize(title), "italic"))
  for number, row in enumerate(rows):
    console.print(_paragraph(heads, row, words, console.width, number == bold))


def _table(heads, rows, title: str, words: int, bold: int | None, box) -> rich_table.Table:
  table = rich_table.Table(
    title=rich_text.Text(sanitize(title)) if title else None,
    title_justify="left",
    box=box,
    show_edge=box is rich_box.HEAVY_HEAD,
    padding=(0, 1) if box is rich_box.HEAVY_HEAD else (0, 1, 0, 0),
  )
  for index, head in enumerate(heads):
    table.add_column(
      rich_text.Text(sanitize(head)), justify="left" if index < words else "right"
    )
  previous = None
  for number, row in enumerate(rows):
    if previous is not None and row[: words - 1] != previous:
      table.add_section()
    previous = row[: words - 1] if words > 1 else None
    cells = [rich_text.Text(sanitize(cell)) for cell in row]
    table.add_row(*cells, style="bold" if number == bold else None)
  return table


def _paragraph(heads, row, words: int, width: int, bold: bool) -> rich_text.Text:
  """`0.12: mean loss 0.05, ...`, folded."""
  name = " ".join(sanitize(cell) for cell in row[: max(1, words)] if cell)
  pairs = zip(heads[max(1, words) :], row[max(1, words) :], strict=True)
  told = ", ".join(f"{sanitize(head)} {sanitize(cell)}" for head, cell in pairs if cell)
  lines = textwrap.wrap(f"{name}: {told}", width, subsequent_indent="  ")
  return rich_text.Text("\n".join(lines), "bold" if bold else "")


# Between two lines where there is no terminal.
LINE_SECONDS = 15.0


class Counter:
  """Counts things that are done; made by `counted`."""

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
def counted(
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
  with progress_bar(console, *columns) as shown:
    yield Counter(shown, total, things, done)


def progress_bar(
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
    self._bar = progress_bar(console, *columns)
    self._task = self._bar.add_task("", total=1.0, text="")
    self.start, self.stop = self._bar.start, self._bar.stop

  def show(self, share: float, text: str) -> None:
    """The share done in [0, 1], and what is being done."""
    self._bar.update(self._task, completed=share, text=sanitize(text))


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
    self._text = f"{100 * share:.0f} %, {sanitize(text)}"
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
    if now - self._told >= LINE_SECONDS:
      self._told = now
      print_text(self._console, f"  {100 * share:.0f} %, {text}", soft_wrap=True)

  def stop(self) -> None:
    """Nothing more."""


def progress_view(console: rich_console.Console) -> View:
  """What progress looks like there."""
  if console.is_jupyter:
    return Notebook()
  return Terminal(console) if console.is_terminal else Lines(console)


class EtaEstimator:
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
    return f"about {clock(seconds * (1.0 - share) / done)} left"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """What runs in the block shows no progress of its own: somebody else does."""
  token = _told.set(True)
  try:
    yield
  finally:
    _told.reset(token)


@contextlib.contextmanager
def show_progress(console: rich_console.Console | None = None) -> Iterator[Report]:
  """Shows what the block reports on standard error, where that is a terminal or a notebook.

  Nothing of it is seen before `LEAST_SECONDS`, nor in a block that is told by another.
  """
  console = console or rich_console.Console(file=sys.stderr)
  if _told.get() or not (console.is_terminal or console.is_jupyter):
    yield lambda share, text: None
    return
  seen, left = progress_view(console), EtaEstimator()

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
def show_count(things: str) -> Iterator[Callable[[int, int], None]]:
  """`show_progress` for what is told as (done, total) of things, like 'prompts'."""
  with show_progress() as report:
    yield lambda done, total: report(done / max(total, 1), f"{done} of {total} {things}")


class Steps:
  """Announces steps; made by `announced_steps`.

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
        print_text(self._bar.console, line)
      self._bar.update(
        self._task,
        completed=share,
        description=sanitize(f"{self._place(number)} {text} · {what}"),
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
    return clock(each * (self._expected - number + 1 - share))

  def _place(self, number: int) -> str:
    return f"[{number}/{max(number, self._expected)}]" if self._expected else f"[{number}]"


@contextlib.contextmanager
def announced_steps(console: rich_console.Console) -> Iterator[Steps]:
  """A bar for the step at work, or a line a step where there is no terminal."""
  columns = (
    rich_progress.BarColumn(bar_width=12),
    rich_progress.TextColumn("{task.fields[left]}", markup=False),
    # What is left of the line: the time that is left is not cut for it.
    rich_progress.TextColumn(
      "{task.description}", markup=False, table_column=rich_table.Column(ratio=1, no_wrap=True)
    ),
  )
  with progress_bar(console, *columns, expand=True) as bar:
    yield Steps(bar)
