"""How the layers of one step are run, and when skipped ones are filled: the same results."""

from calm.decode.engines.choice import ENGINES, MANY_ROWS, bind, by_name, default_engine
from calm.decode.engines.compacted import Compacted
from calm.decode.engines.deferred import Deferred
from calm.decode.engines.eager import Eager
from calm.decode.engines.engine import Bound, Engine, Task, grown, shifted

__all__ = [
  "ENGINES",
  "MANY_ROWS",
  "Bound",
  "Compacted",
  "Deferred",
  "Eager",
  "Engine",
  "Task",
  "bind",
  "by_name",
  "default_engine",
  "grown",
  "shifted",
]
