"""Stage one (Eq. 6) and stage two (the exit classifier): objectives, updates,
runs.
"""

from calm.training.loop import Listener, read_history
from calm.training.updates import Schedule, TrainConfig, adafactor, adam

__all__ = [
  "Listener",
  "Schedule",
  "TrainConfig",
  "adafactor",
  "adam",
  "read_history",
]
