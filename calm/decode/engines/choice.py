"""Which engine runs a task: the one asked for, or the fastest for its rule and rows."""

from collections.abc import Mapping

from calm import exits
from calm.decode.engines import compacted, deferred
from calm.decode.engines.eager import Eager
from calm.decode.engines.engine import Bound, Engine, Task

# From this batch on, the layers that rows save by leaving pay for moving those that stay.
MANY_ROWS = 8


# Names on the command line; all engines decode the same.
ENGINES: Mapping[str, Engine] = {
  "eager": Eager(),
  "deferred": deferred.Deferred(),
  "compacted": compacted.Compacted(),
}


def by_name(name: str) -> Engine:
  """The engine of a name.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in ENGINES:
    raise ValueError(f"Expected `engine` to be one of {sorted(ENGINES)}. Got {name!r}.")
  return ENGINES[name]


def default_engine(rule: exits.StepRule, batch_size: int) -> Engine:
  """The engine that is fastest for a rule and a number of rows."""
  if not deferred.can_defer(rule):
    return Eager()
  return compacted.Compacted() if batch_size >= MANY_ROWS else deferred.Deferred()


def bind(task: Task, engine: Engine | None = None) -> Bound:
  """An engine at work on a task; None takes `default_engine` for its rule and rows."""
  return (engine or default_engine(task.rule, task.batch_size))(task)
