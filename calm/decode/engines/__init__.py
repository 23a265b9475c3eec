"""How the layers of one step are run, and when skipped ones are filled: the same results."""

from calm.decode.engines.engine import Bound, Eager, Engine, Task, after, shifted

__all__ = ["Bound", "Eager", "Engine", "Task", "after", "shifted"]
