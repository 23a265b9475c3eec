"""Signals that end a program between two steps of its loops, never in the middle of one.

An exception of a signal handler comes at any bytecode: a weak reference's callback prints it,
a library's `except` swallows it. Here a handler only sets a flag, which loops read between two
steps (`check`). A second signal ends the process at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

_CURSOR = b"\x1b[?25h"  # shown again: a progress bar hides it
_first: int | None = None  # number of the signal that came, the flag


class Terminated(KeyboardInterrupt):
  """SIGTERM came: a command ends as after Ctrl-C, with an exit status of its own."""


def check() -> None:
  """KeyboardInterrupt or `Terminated` where a signal came in `deferred`, at each call again."""
  if _first is not None:
    raise Terminated if _first == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """SIGINT and SIGTERM set the flag of `check` in the block; the second one ends the process.

  The exit status is then 130 or 143. Ignored signals stay ignored. Nothing changes in a block
  within such a block, nor in another thread than the main one, which alone can handle signals.
  At its end the block calls `check`.
  """
  global _first
  handled = (signal.SIGINT, signal.SIGTERM)
  inner = signal.getsignal(signal.SIGTERM) is _note
  if inner or threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = {number: signal.getsignal(number) for number in handled}
  before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  watcher = threading.Thread(target=_end_at_second, args=(reader, set(before)), daemon=True)
  watcher.start()
  for number in before:
    signal.signal(number, _note)
  try:
    yield
    check()
  finally:
    for number, old in before.items():
      signal.signal(number, old)
    signal.set_wakeup_fd(wakeup)
    os.close(writer)
    watcher.join()
    os.close(reader)
    _first = None


def _note(number: int, frame: object) -> None:
  """The handler: sets the flag, which nothing takes back in the block."""
  global _first
  if _first is None:
    _first = number
    if os.isatty(2):
      os.write(2, b"\ncalm: stopping after this step; once more stops at once.\n")


def _end_at_second(reader: int, numbers: set[int]) -> None:
  """Ends the process at the second signal, whatever its main thread does.

  Python runs a handler between two bytecodes, and two signals during one compiled call as one;
  the system writes the number of each to the pipe at once.
  """
  came = 0
  while number := os.read(reader, 1):
    came += number[0] in numbers
    if came == 2:
      end(number[0])


def end(number: int) -> None:
  """Ends the process with one line and exit status 128 + `number`, without any clean-up."""
  line = b"calm: stopped at once.\n"
  os.write(2, (_CURSOR if sys.stderr.isatty() else b"") + line)
  os._exit(128 + number)
