"""Text and progress on a console: a terminal, a notebook, a pipe or a file."""

import contextlib
import contextvars
import datetime
import functools
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator

from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table
from rich import text as rich_text

# Categories of control and format characters, surrogates, and separators of
# lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # letters of Persian, Hindi and others need them


def sanitize(text: object) -> str:
  """A text that can be printed safely: control and direction marks become their
  escapes.

  Ends of lines and tabs stay.
  """
  return "".join(
    c.encode("unicode_escape").decode()
    if unicodedata.category(c) in _HIDDEN and c not in "\n\t" + _JOINERS
    else c
    for c in str(text)
  )


def print_text(
  console: rich_console.Console,
  text: object,
  style: str = "",
  *,
  soft_wrap: bool = False,
) -> None:
  """Prints a sanitized text, without reading markup or emoji codes in it.

  With `soft_wrap` the terminal folds long lines, so that they can be copied.
  """
  console.print(rich_text.Text(sanitize(text), style), soft_wrap=soft_wrap)


# A progress callback: the share of the work that is done, in [0, 1], and what
# is being done.
Report = Callable[[float, str], None]

LEAST_SECONDS = 2.0  # work that ends sooner shows no progress
LINE_SECONDS = 15.0  # between two lines in a pipe, a file or a notebook

_quiet: contextvars.ContextVar[bool] = contextvars.ContextVar(
  "quiet", default=False
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Within the block, a `Progress` without a console of its own shows
  nothing.
  """
  token = _quiet.set(True)
  try:
    yield
  finally:
    _quiet.reset(token)


class Progress:
  """Progress of a block of work: call it with the share done in [0, 1] and a
  text.

  A terminal shows a bar, of which nothing stays, from the first report after
  `LEAST_SECONDS`; a notebook, a pipe or a file get a line every `LINE_SECONDS`.
  The remaining time is judged by the work since the first report above 0:
  before it, programs were compiled or an earlier run did the work.

  Args:
    console: the console; None is standard error, if that is a terminal or a
      notebook and the block lies in no other `Progress` and no `quiet`.
  """

  def __init__(self, console: rich_console.Console | None = None):
    self._console = console or rich_console.Console(file=sys.stderr)
    self._silent = console is None and (
      _quiet.get()
      or not (self._console.is_terminal or self._console.is_jupyter)
    )
    self._drawn = self._console.is_terminal and not self._console.is_jupyter
    self._since = self._last = time.monotonic()

  # one prompt alone decodes in less time than it is made in
  @functools.cached_property
  def _bar(self) -> rich_progress.Progress:
    cut = rich_table.Column(ratio=1, no_wrap=True)  # the remaining time is not
    # Texts that are printed go to where standard output goes, beside the bar or
    # not.
    bar = rich_progress.Progress(
      rich_progress.BarColumn(bar_width=12),
      rich_progress.TimeRemainingColumn(),
      rich_progress.TextColumn(
        "{task.description}", markup=False, table_column=cut
      ),
      console=self._console,
      transient=True,
      expand=True,
      redirect_stdout=False,
      speed_estimate_period=3600,
      get_time=time.monotonic,
    )
    bar.add_task("", total=1.0)
    return bar

  def __enter__(self) -> "Progress":
    self._outer = _quiet.set(True)
    return self

  def __exit__(self, *_: object) -> None:
    _quiet.reset(self._outer)
    self.hide()

  def __call__(self, share: float, text: str) -> None:
    """Reports the share of the work that is done, in [0, 1], and what is being
    done.
    """
    if self._silent:
      return
    now = time.monotonic()
    self._bar.update(
      self._bar.task_ids[0], completed=share, description=sanitize(text)
    )
    if self._drawn:
      if now - self._since >= LEAST_SECONDS:
        self._bar.start()
    elif now - self._last >= LINE_SECONDS and share < 1.0:
      seconds = self._bar.tasks[0].time_remaining
      left = (
        ""
        if seconds is None
        else f"about {datetime.timedelta(seconds=seconds)} left, "
      )
      print_text(
        self._console, f"  {100 * share:.0f} %, {left}{text}", soft_wrap=True
      )
      self._last = now

  def hide(self) -> None:
    """Takes the bar off the terminal, until the next report, so that texts can
    be printed.
    """
    if not self._silent and self._bar.live.is_started:
      self._bar.stop()

  def count(self, things: str) -> Callable[[int, int], None]:
    """A callback of (done, total) things, such as 'prompts'."""
    return lambda done, total: self(
      done / max(total, 1), f"{done} of {total} {things}"
    )

  def step(self, title: str) -> Report:
    """The callback of another part, whose title is shown with its first report.

    A part that never reports was done by an earlier run.
    """
    begun = False

    def report(share: float, text: str) -> None:
      nonlocal begun
      if not begun and not self._silent:
        # the last part's time tells nothing of this one
        self._bar.reset(self._bar.task_ids[0])
        print_text(self._console, f"{title} ...", soft_wrap=True)
      begun = True
      self(share, text)

    return report
