"""The command `calm`, and `python -m calm`."""

import os
import signal
import sys


def main() -> int:
  """Runs one command; a signal while its modules are imported ends it with one line."""
  for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _end)
  from calm.commands import cli

  return cli.main()


def _end(number: int, frame: object) -> None:
  os.write(2, b"calm: stopped.\n")
  os._exit(128 + number)  # an exception would come in the middle of an import


if __name__ == "__main__":
  sys.exit(main())
