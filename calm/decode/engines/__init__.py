"""How the layers of one step are run, and when skipped ones are filled: the same results.

`default_engine` takes the fastest engine of a rule, a number of rows and a platform.
"""

from collections.abc import Mapping
from typing import Any

import jax

from calm import exits
from calm.decode.engines.compacted import Compacted
from calm.decode.engines.deferred import Deferred
from calm.decode.engines.engine import Eager, Task, grown

__all__ = [
  "ENGINES",
  "MANY_ROWS",
  "Compacted",
  "Deferred",
  "Eager",
  "Engine",
  "Task",
  "default_engine",
  "grown",
]

# A class of engines, of which an instance runs one task: `Eager`, or a subclass.
Engine = type[Eager]

# From so many rows on, the layers that they save by leaving pay for moving those that stay.
MANY_ROWS = 8

# By platform, (from this many rows on, engine), ascending: cpu as measured (scripts/README.md),
# tpu as its compiler estimates (scripts/results/tpu.json), where `Compacted` lays matrices out
# anew at every token. `Eager` projects a seventh of a layer for every one that is skipped.
_BY_PLATFORM: Mapping[str, tuple[tuple[int, Engine], ...]] = {
  "cpu": ((1, Deferred), (MANY_ROWS, Compacted)),
  "tpu": ((1, Deferred),),
}


# Names of options; all engines decode the same.
ENGINES: Mapping[str, Engine] = {
  "eager": Eager,
  "deferred": Deferred,
  "compacted": Compacted,
}


def default_engine(rule: exits.Rule, rows: Any, platform: str | None = None) -> Engine:
  """The engine that is fastest for a rule and a number of rows on a platform.

  Args:
    rule: how a token goes through the layers.
    rows: of the batch, or of one shard of it; where it is symbolic (`jax.export`), `Eager`,
      which need not know it.
    platform: 'cpu', 'tpu', ...; None: JAX's default. Platforms that nothing is known of are
      treated like a CPU.
  """
  defers = isinstance(rule, exits.DynamicExits) and rule.propagation.projects_state
  if not defers or not isinstance(rows, int):
    return Eager
  known = _BY_PLATFORM.get(platform or jax.default_backend(), _BY_PLATFORM["cpu"])
  return [engine for least, engine in known if least <= max(rows, 1)][-1]
