"""From a T5 and a file of rows to a folder that serves early exits under a promise.

model = fit("flan-t5-small", "rows.jsonl", tolerance=0.1, output="mine")
"""

from calm.fitting.request import FitOptions, Listener, parse_budget
from calm.fitting.run import fit, on_screen

__all__ = ["FitOptions", "Listener", "fit", "on_screen", "parse_budget"]
