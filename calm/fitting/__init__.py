"""From a T5 and a file of rows to a folder that serves early exits under a promise.

model = fit("flan-t5-small", "rows.jsonl", tolerance=0.1, output="mine")
"""

from calm.fitting.options import FitOptions, Listener, on_screen, parse_budget
from calm.fitting.run import fit
from calm.fitting.splits import HeldOut, held_out

__all__ = ["FitOptions", "HeldOut", "Listener", "fit", "held_out", "on_screen", "parse_budget"]
