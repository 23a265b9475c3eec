"""The command `calm`, and `python -m calm`."""

import signal
import sys

from calm import signals


def main() -> int:
  """Runs one command; a signal while its modules are imported ends it with one line."""
  for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
      # An exception would come in the middle of an import.
      signal.signal(number, lambda number, frame: signals.end(number))
  from calm.commands import cli

  return cli.main()


if __name__ == "__main__":
  sys.exit(main())
