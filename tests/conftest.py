"""Test-wide strictness: shapes may not broadcast in rank by accident, CPU only."""

import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The three Debian data sets, or a skip that says how to get them."""
  path = pathlib.Path(os.environ.get("CALM_DATA", REPOSITORY.parent / "shared" / "data"))
  if not path.is_dir():
    pytest.skip(f"needs the Debian data sets: set CALM_DATA to their folder (looked in {path})")
  return path
