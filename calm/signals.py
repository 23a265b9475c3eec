"""SIGINT and SIGTERM end a command at once, with one line that says what is
kept.

Nothing is torn by that: files are written whole or line by line
(`calm.storage`), and jobs go on. An exception in their place would come at any
bytecode: a weak reference's callback prints it, a library's `except` swallows
it, and a compiled call holds it up.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

HANDLED = (signal.SIGINT, signal.SIGTERM)
# removes a progress bar, and shows the cursor that it hides
_BAR = b"\r\x1b[2K\x1b[?25h"


@contextlib.contextmanager
def handling(
  handler: Callable[[int, object], object], wakeup: int = -1
) -> Iterator[None]:
  """A function handles SIGINT and SIGTERM in the block; ignored signals stay
  ignored.

  Args:
    handler: called with the number of the signal, between two bytecodes of the
      main thread.
    wakeup: a descriptor that the system writes the number to at once.
  """
  before = {number: signal.getsignal(number) for number in HANDLED}
  before = {
    n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)
  }
  outer = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
  for number in before:
    signal.signal(number, handler)
  try:
    yield
  finally:
    for number, old in before.items():
      signal.signal(number, old)
    signal.set_wakeup_fd(outer)


@contextlib.contextmanager
def ending(kept: str) -> Iterator[None]:
  """SIGINT and SIGTERM end the process in the block, with the line `kept`,
  whatever it does.

  The exit status is 130 or 143. Nothing changes in another thread than the main
  one, which alone can handle signals.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  watcher = threading.Thread(target=_watch, args=(reader, kept), daemon=True)
  watcher.start()
  try:
    with handling(lambda number, frame: None, writer):
      yield
  finally:
    os.close(writer)
    watcher.join()
    os.close(reader)


def _watch(reader: int, kept: str) -> None:
  while number := os.read(reader, 1):
    if number[0] in HANDLED:
      end(number[0], kept)


def end(number: int, kept: str = "stopped at once") -> None:
  """Ends the process with one line and exit status 128 + `number`, without any
  clean-up.
  """
  line = f"calm: {kept}.\n".encode()
  os.write(2, (_BAR if sys.stderr.isatty() else b"") + line)
  os._exit(128 + number)
