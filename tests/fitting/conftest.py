"""What tests of a fit's parts share; what it needs may be missing, and the files skip then."""

import pytest


@pytest.fixture
def promotion_of_optax():
  import jax

  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A toy's folder."""
  from tests.inference import predictor_test

  return predictor_test.save(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def model(directory):
  """The toy, opened."""
  from calm import inference
  from tests.inference import predictor_test

  return inference.load(directory, **predictor_test.OPTIONS)


@pytest.fixture(scope="module")
def parts(rows):
  """The `rows` of a file, split as for a fit that trains."""
  from calm.fitting import splits

  return splits.split(rows, trains=True, tolerance=0.5, error_rate=0.05)
