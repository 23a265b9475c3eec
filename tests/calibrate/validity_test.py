"""At its boundary each promise is broken no more often than it says, however
rows are stored.

The laws are those of `scripts/validity.py`, which draws them 20,000 times.
"""

import importlib
import pathlib

import numpy as np
import pytest
from scipy import stats

SCRIPTS = str(pathlib.Path(__file__).parents[2] / "scripts")
# as `python scripts/validity.py` finds its parts
with pytest.MonkeyPatch.context() as patch:
  patch.syspath_prepend(SCRIPTS)
  validity = importlib.import_module("validity")
  laws = importlib.import_module("laws")


@pytest.mark.parametrize("number", range(len(validity.CELLS)))
def test_a_promise_is_wrong_no_more_often_than_it_says(number):
  *_, level, wrong, _, draws = map(
    str, validity.simulate(validity.CELLS[number], 160, number)
  )
  hits = round(float(wrong) * int(draws))
  test = stats.binomtest(hits, int(draws), float(level), alternative="greater")
  assert test.pvalue > 1e-3, (validity.CELLS[number], wrong)


def of_kinds(kinds):
  """A law of losses 0, 1 / (kinds - 1), ..., 1 whose mean is given."""
  levels = np.linspace(0.0, 1.0, kinds)[1:]
  return lambda g, mean, n: (
    (g.random(n) < mean / levels.mean()) * g.choice(levels, n)
  )


@pytest.mark.parametrize("order", validity.ORDERS)
@pytest.mark.parametrize(
  "law", [laws.text, laws.zero_or_one, of_kinds(3), of_kinds(8)]
)
def test_stored_tables_are_certified_wrongly_no_more_often_than_promised(
  law, order
):
  share = validity.wrong_in_order(
    np.random.default_rng(97), order, law, 97, 100
  )
  assert share <= stats.binom.ppf(0.999, 100, validity.LEVEL) / 100


def test_an_order_of_names_alone_would_be_wrong(monkeypatch):
  """Which shows that the tests above can fail: one order for all tables of a
  size.
  """
  made = validity.SequenceLosses
  names = tuple(f"p{row:03d}" for row in range(383))
  monkeypatch.setattr(
    validity, "SequenceLosses", lambda *a: made(*a, ids=names, contents="2")
  )
  generator = np.random.default_rng(383)
  assert (
    validity.wrong_in_order(generator, "sorted", laws.zero_or_one, 383, 100)
    > 0.2
  )
