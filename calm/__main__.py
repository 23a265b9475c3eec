"""The command `calm`, and `python -m calm`."""

import sys

from calm import signals


def main() -> int:
  """Runs one command; a signal while its modules are imported ends it with one
  line.
  """
  with signals.ending("stopped at once"):
    from calm.commands import cli

    return cli.main()


if __name__ == "__main__":
  sys.exit(main())
