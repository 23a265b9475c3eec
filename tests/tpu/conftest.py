"""The scripts as modules, as `python scripts/tpu_report.py` finds them."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))
