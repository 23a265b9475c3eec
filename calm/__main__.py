"""`python -m calm`."""

import sys

from calm.commands import cli

sys.exit(cli.main())
