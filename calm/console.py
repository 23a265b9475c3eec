"""Text, tables and progress on a console: a terminal, a notebook, a pipe or a file."""

import contextlib
import contextvars
import re
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from rich import console as rich_console
from rich import measure as rich_measure
from rich import progress as rich_progress
from rich import table as rich_table
from rich import text as rich_text

# Categories of control and format characters, surrogates, and separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # letters of Persian, Hindi and others need them


def sanitize(text: object) -> str:
  """A text that can be printed safely: control and direction marks become their escapes.

  Ends of lines and tabs stay.
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
  """Prints a sanitized text, without reading markup or emoji codes in it.

  With `soft_wrap` the terminal folds long lines, so that they can be copied.
  """
  console.print(rich_text.Text(sanitize(text), style), soft_wrap=soft_wrap)


def print_table(
  console: rich_console.Console,
  heads: Sequence[str],
  rows: Sequence[Sequence[str]],
  *,
  title: str = "",
  bold: int | None = None,
) -> None:
  """Prints a table of sanitized texts; on a narrow console every row becomes a paragraph."""
  heads, rows = [*map(sanitize, heads)], [[*map(sanitize, row)] for row in rows]
  anywhere, style = console.options.update(width=10_000), lambda row: "bold" * (row == bold)
  for names in (heads, [re.sub(r" (?!/)", "\n", head) for head in heads]):
    table = rich_table.Table(
      title=rich_text.Text(sanitize(title)) if title else None, title_justify="left"
    )
    for number, head in enumerate(names):
      table.add_column(rich_text.Text(head), justify="right" if number else "left")
    for number, row in enumerate(rows):
      table.add_row(*map(rich_text.Text, row), style=style(number))
    if rich_measure.Measurement.get(console, anywhere, table).maximum <= console.width:
      console.print(table)
      return
  if title:
    print_text(console, title, "italic")
  for number, (name, *cells) in enumerate(rows):
    values = (f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True) if cell)
    text = textwrap.fill(f"{name}: {', '.join(values)}", console.width, subsequent_indent="  ")
    console.print(rich_text.Text(text, style(number)))


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


# A progress callback: the share of the work that is done, in [0, 1], and what is being done.
Report = Callable[[float, str], None]

LEAST_SECONDS = 2.0  # work that ends sooner shows no progress
LINE_SECONDS = 15.0  # between two lines in a pipe, a file or a notebook

_quiet: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Within the block, a `Progress` without a console of its own shows nothing."""
  token = _quiet.set(True)
  try:
    yield
  finally:
    _quiet.reset(token)


class Progress:
  """Progress of a block of work: call it with the share done in [0, 1] and a text.

  A terminal shows a bar, of which nothing stays, after `LEAST_SECONDS`; a notebook, a pipe or a
  file get a line every `LINE_SECONDS`. The remaining time is judged by the work since the first
  report above 0: before it, programs were compiled or an earlier run did the work.

  Args:
    console: the console; None is standard error, if that is a terminal or a notebook and the
      block lies in no other `Progress` and no `quiet`.
  """

  def __init__(self, console: rich_console.Console | None = None):
    self._console = console or rich_console.Console(file=sys.stderr)
    self._silent = console is None and (
      _quiet.get() or not (self._console.is_terminal or self._console.is_jupyter)
    )
    self._bar: rich_progress.Progress | None = None
    if self._console.is_terminal and not self._console.is_jupyter:
      cut = rich_table.Column(ratio=1, no_wrap=True)  # the remaining time is not
      # Texts that are printed go to where standard output goes, beside the bar or not.
      self._bar = rich_progress.Progress(
        rich_progress.BarColumn(bar_width=12),
        rich_progress.TextColumn("{task.fields[left]}", markup=False),
        rich_progress.TextColumn("{task.description}", markup=False, table_column=cut),
        console=self._console,
        transient=True,
        expand=True,
        redirect_stdout=False,
      )
      self._task = self._bar.add_task("", total=1.0, left="")
    self._last = time.monotonic()
    self._begun: tuple[float, float] | None = None
    self._steps = self._announced = self._worked = 0

  def __enter__(self) -> "Progress":
    self._block = contextlib.ExitStack()
    self._block.enter_context(quiet())
    if self._bar is not None and not self._silent:
      timer = threading.Timer(LEAST_SECONDS, self._bar.start)
      timer.daemon = True
      timer.start()
      for end in (self._bar.stop, timer.join, timer.cancel):  # the last one is called first
        self._block.callback(end)
    return self

  def __exit__(self, *_: object) -> None:
    self._block.close()

  def __call__(self, share: float, text: str) -> None:
    """Reports the share of the work that is done, in [0, 1], and what is being done."""
    if self._silent:
      return
    left, now = self._left(share), time.monotonic()
    if self._bar is not None:
      self._bar.update(self._task, completed=share, description=sanitize(text), left=left)
    elif now - self._last >= LINE_SECONDS and share < 1.0:
      text = f"  {100 * share:.0f} %, {f'{left}, ' if left else ''}{text}"
      print_text(self._console, text, soft_wrap=True)
      self._last = now

  def _left(self, share: float) -> str:
    """Like `about 1:20 left`; '' before anything is known."""
    now = time.monotonic()
    if self._begun is None and share > 0.0:
      self._begun = (share, now)
    if self._begun is None:
      return ""
    done, seconds = share - self._begun[0], now - self._begun[1]
    if done < 0.03 or seconds < LEAST_SECONDS or share >= 1.0:
      return ""
    return f"about {clock(seconds * (1.0 - share) / done)} left"

  def count(self, things: str) -> Callable[[int, int], None]:
    """A callback of (done, total) things, such as 'prompts'."""
    return lambda done, total: self(done / max(total, 1), f"{done} of {total} {things}")

  def restart(self, text: str) -> None:
    """Begins another part, of which the time that the last one took says nothing."""
    self._begun = None
    if self._bar is not None:
      self._bar.update(self._task, completed=0.0, description=sanitize(text), left="")

  def expect(self, steps: int) -> None:
    """Sets the number of steps that `step` will announce."""
    self._steps = steps

  def step(self, title: str) -> Report:
    """Announces the next step; returns its callback, for the share of this step.

    A step that never reports was done by an earlier run, and counts for no time.
    """
    self._announced += 1
    number, worked = self._announced, 0

    def report(share: float, text: str) -> None:
      nonlocal worked
      steps = max(number, self._steps)
      name = f"[{number}/{steps}] {title}"
      if not worked:
        self._worked += 1
        worked = self._worked
        if self._bar is None and not self._silent:
          print_text(self._console, name)
      self((worked - 1 + share) / (steps - number + worked), f"{name}: {text}")

    return report

  @contextlib.contextmanager
  def hidden(self) -> Iterator[None]:
    """Takes the bar off the terminal while the block prints."""
    bar = self._bar if self._bar is not None and self._bar.live.is_started else None
    if bar is not None:
      bar.stop()
    try:
      yield
    finally:
      if bar is not None:
        bar.start()
