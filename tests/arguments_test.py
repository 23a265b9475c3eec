"""Arguments of `calm.calibrate`: what stands for a value passes, the rest is
named.
"""

import fractions
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from calm import arguments, calibrate
from calm.calibrate import (
  Online,
  Prompt,
  SequenceLosses,
  Support,
  each_group,
  metrics,
  planning,
  risks,
)
from tests import odd_arguments

COUNT = 60
GRID = [0.9, 0.5]
LOSSES = [[0.0, float(row % 3 == 0)] for row in range(COUNT)]
LABELS = ["a", "b"] * (COUNT // 2)
RATES = {"tolerance": 0.1, "error_rate": 0.05}
FULL = [f"text {row}" for row in range(COUNT)]
CHEAP = [*FULL[:40], *("other",) * 20]
TABLE = np.full((COUNT, 2), 0.4)


def losses() -> SequenceLosses:
  return SequenceLosses(np.array(LOSSES), np.array(GRID))


@arguments.checked(found=len)
def every(
  flag: bool = False,
  count: int = 0,
  rate: float = 0.0,
  text: str = "",
  kind: Literal["a", "b"] = "a",
  counts: Sequence[int] = (),
  pair: tuple[float, ...] | None = None,
  tables: Mapping[str, Sequence[str]] | None = None,
  call: Callable[[], Any] = dict,
  path: str | pathlib.Path = "",
  found: int = 0,
  array: np.ndarray | Sequence[float] = (),
  *,
  anything: Any = None,
  **rest: Any,
) -> dict[str, Any]:
  return {k: v for k, v in locals().items() if k != "rest"} | rest


@pytest.mark.parametrize(
  ("given", "taken"),
  [
    ({"flag": np.bool_(True)}, {"flag": True}),
    ({"count": np.array(3)}, {"count": 3}),
    ({"rate": np.float32(0.5)}, {"rate": 0.5}),
    ({"rate": fractions.Fraction(1, 2)}, {"rate": 0.5}),
    ({"text": np.str_("x")}, {"text": "x"}),
    ({"counts": (value for value in [1, 2])}, {"counts": (1, 2)}),
    ({"counts": np.array([1, 2])}, {"counts": [1, 2]}),
    ({"pair": [0.5, 1]}, {"pair": (0.5, 1)}),
    ({"pair": None}, {"pair": None}),
    ({"tables": {"a": iter(["x"])}}, {"tables": {"a": ("x",)}}),
    ({"path": pathlib.Path("x")}, {"path": pathlib.Path("x")}),
    ({"found": "four"}, {"found": 4}),
    ({"array": {1}}, {"array": {1}}),  # whoever reads an array checks it
    ({"anything": {1}, "other": {2}}, {"anything": {1}, "other": {2}}),
  ],
)
def test_what_stands_for_a_value_passes_in_the_form_of_the_annotation(
  given, taken
):
  made = every(**given)
  for name, value in taken.items():
    assert repr(made[name]) == repr(value)  # the type too


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"flag": 1}, "`flag` to be True or False, got 1 (int)."),
    ({"count": True}, "`count` to be a whole number, got True (bool)."),
    (
      {"rate": np.array([0.5])},
      "`rate` to be a number, got array([0.5]) (ndarray).",
    ),
    ({"kind": "c"}, "`kind` to be one of 'a', 'b', got 'c' (str)."),
    (
      {"counts": "12"},
      "`counts` to be a list of whole numbers, got '12' (str).",
    ),
    (
      {"counts": {1, 2}},
      "`counts` to be a list of whole numbers, got {1, 2} (set).",
    ),
    (
      {"counts": [1, "2"]},
      "`counts` to be a list of whole numbers, got '2' (str) at 1.",
    ),
    (
      {"pair": [None]},
      "`pair` to be a list of numbers or None, got None (NoneType) at 0.",
    ),
    (
      {"tables": {"a": "x"}},
      "`tables` to be a mapping to a list of texts or None, got 'x'",
    ),
    ({"call": 1}, "`call` to be a function, got 1 (int)."),
    ({"path": int}, "`path` to be a text or a `Path`, got the class int."),
  ],
)
def test_the_rest_is_refused_by_name(given, message):
  with pytest.raises(ValueError, match=re.escape(f"Expected {message}")):
    every(**given)


def certify(promise: Any = None, **options) -> calibrate.Calibration:
  return calibrate.calibrate(LOSSES, GRID, promise=promise, **RATES, **options)


PLANNED = {"tolerance": 0.1, "error_rate": 0.05}
ONE = {"losses": losses(), "tolerance": 0.1, "name": "a"}
FAMILIES = {
  "risks": {"a": [risks.Risk(**ONE)]},
  "costs": {"a": TABLE},
  "error_rate": 0.05,
}
PROMISES = (
  (risks.Quantile, {}),
  (risks.TailMean, {}),
  (risks.EveryGroup, {"labels": LABELS}),
  (risks.EarlyExits, {"limits_of_depth": (2.0,), "depths": TABLE}),
  (risks.KnownMixture, {"most": 2.0, "weights": [1.0] * COUNT}),
  (risks.Cost, {"costs": TABLE}),
)
# What is called with exchanged arguments, and whose they are; those that are
# needed.
BORDER = [
  (
    calibrate.calibrate,
    calibrate.calibrate,
    {"losses": LOSSES, "thresholds": GRID, **RATES},
  ),
  (
    lambda **given: calibrate.calibrate(
      risks=[risks.Risk(**given)], error_rate=0.05
    ),
    risks.Risk,
    ONE,
  ),
  (
    calibrate.from_texts,
    calibrate.from_texts,
    {"full": FULL, "early": {"a": FULL, "b": CHEAP}},
  ),
  *(
    (lambda kind=kind, **given: certify(kind(**given)), kind, needed)
    for kind, needed in PROMISES
  ),
  *(
    (call, call, needed)
    for call, needed in (
      (
        SequenceLosses,
        {"values": LOSSES, "thresholds": GRID, "support": Support()},
      ),
      (Support, {}),
      (calibrate.calibrate_configurations, FAMILIES),
      (metrics.Metric, {"name": "a", "function": metrics.chrf}),
      (planning.min_calibration_size, PLANNED),
      (planning.method_size, {"method": "auto", **PLANNED}),
      (planning.refusal, {"num_examples": 9, **PLANNED}),
      (Online, {"path": None, "thresholds": GRID, "tolerance": 0.1}),
      (Prompt, {"id": "a", "input": "b"}),
      (each_group, {"losses": losses(), "labels": LABELS, "error_rate": 0.05}),
    )
  ),
]


@pytest.mark.parametrize(
  ("call", "of", "needed"), BORDER, ids=[b[1].__name__ for b in BORDER]
)
def test_every_argument_is_taken_or_refused_by_name(
  call, of, needed, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)  # a path among the odd values is written to
  parameters = inspect.signature(of).parameters.values()
  given = {
    p.name: p.default for p in parameters if p.default is not p.empty
  } | needed
  given.pop("metric", None)  # a user's function may do what it likes
  given |= {"tolerance": 0.1} if of is each_group else {}
  call(**given)
  assert list(odd_arguments.unclear(call, given)) == []


def test_the_law_of_arguments_can_fail():
  found = list(odd_arguments.unclear(lambda count: count + 1, {"count": 1}))
  assert {type(error) for _, _, error in found} >= {TypeError} and len(
    found
  ) > 8
