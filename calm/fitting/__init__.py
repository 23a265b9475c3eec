"""From a T5 and a file of rows to a folder that serves early exits under a
promise.

model = fit("flan-t5-small", "rows.jsonl", tolerance=0.1, output="mine")
"""

from calm.fitting.request import FitOptions, parse_budget
from calm.fitting.run import fit

__all__ = ["FitOptions", "fit", "parse_budget"]
