"""`python -m calm`."""

import sys

from calm import cli

sys.exit(cli.main())
