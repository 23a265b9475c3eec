"""A toy of bytes that tests of predictors share."""

import pytest


@pytest.fixture(scope="session")
def model(directory):
  from calm import inference
  from tests.inference import predictor_test

  return inference.load(directory, **predictor_test.OPTIONS)
