"""What tests of 8-bit products share."""

import pytest

from calm.t5 import platforms


@pytest.fixture(params=[False, True], ids=["signed", "unsigned"])
def unsigned(request, monkeypatch):
  """Both ways to multiply, whatever the machine likes."""
  monkeypatch.setattr(platforms, "multiplies_unsigned", lambda: request.param)
  return request.param
