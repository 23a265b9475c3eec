"""The table beside other risk control: what certifies more, and which choices
are wrong.
"""

import importlib
import pathlib

import numpy as np
import pytest


@pytest.fixture
def peers(monkeypatch):
  """The script, as `python scripts/compare_peers.py` finds it."""
  monkeypatch.syspath_prepend(
    str(pathlib.Path(__file__).parents[2] / "scripts")
  )
  return importlib.import_module("compare_peers")


def columns(peers, law: str, draws: int) -> dict[str, tuple[float, float]]:
  """{method: (layers, share of wrong choices)} of 100 prompts at tolerance
  0.1.
  """
  cells = peers.row(peers.of_law(law, 0.1), 0.1, 100, draws)[3:]
  parts = {
    name: cell.rstrip(")").partition(" (")
    for name, cell in zip(peers.METHODS, cells, strict=True)
  }
  return {
    name: (float(a), float(b or 0.0)) for name, (a, _, b) in parts.items() if a
  }


@pytest.mark.parametrize("law", ["text", "signed"])
def test_bets_for_one_level_certify_more_than_other_bounds(peers, law):
  layers = {name: found[0] for name, found in columns(peers, law, 40).items()}
  assert (
    layers["oracle"] < layers["auto"] < layers["WSR"] < layers["paper"] <= 8.0
  )


def test_wrong_choices_are_counted(peers):
  wrong = {
    name: found[1] for name, found in columns(peers, "0 or 1", 60).items()
  }
  assert wrong["oracle"] == 0.0 and wrong["auto"] <= 0.12
  assert wrong["CRC"] > 0.0  # it keeps the mean over draws alone
  assert peers.first_failure(np.array([True, False, True])) == 1
