"""Values that fit few arguments, and the law of public functions: taken, or
refused by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

# Each makes its value anew: a generator is read once.
ODD: tuple[Callable[[], Any], ...] = (
  lambda: None,
  lambda: "odd",
  lambda: b"odd",
  lambda: -1,
  lambda: 1.5,
  lambda: float("nan"),
  lambda: float("inf"),
  lambda: True,
  lambda: [],
  lambda: [None],
  lambda: ["odd"],
  lambda: [[1]],
  lambda: {},
  lambda: {"odd": 1},
  lambda: {1},
  lambda: np.array([0.5]),
  lambda: np.array(["odd"]),
  lambda: (x for x in (1,)),
  object,
  lambda: int,
  lambda: 1j,
)
REFUSAL = re.compile(r".*[Ee]xpected .+, got:? .+", re.DOTALL)


def unclear(
  call: Callable[..., Any], arguments: Mapping[str, Any]
) -> Iterator[tuple[Any, ...]]:
  """(argument, value, error) wherever an odd value in place of one of the
  arguments is answered neither by a result nor by a refusal that says what was
  expected and what was got.
  """
  for name in arguments:
    for make in ODD:
      value = make()
      try:
        call(**{**arguments, name: value})
      except Exception as error:
        # The tests' own checker of annotations takes no whole number for a
        # float.
        if type(error).__module__.startswith("jaxtyping"):
          continue
        refuses = isinstance(error, ValueError | TypeError | OSError)
        if not refuses or not REFUSAL.fullmatch(str(error)):
          yield name, value, error
