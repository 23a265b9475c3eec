"""Test-wide strictness: CPU only, no promotion by accident, annotated shapes are checked."""

import contextlib
import importlib.util
import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# JAX reads these when it is first imported: fixtures of any scope are under them.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Modules whose jaxtyping annotations are checked at every call (`calibrate` has none).
CHECKED = (
  *("data.prompt_batches", "decode.loop", "decode.pool", "decode.pool_program"),
  *("decode.program", "exits.confidence", "exits.propagation", "exits.rules"),
  *("exits.schedules", "inference.options", "inference.outputs", "inference.predictor"),
  *("inference.opening", "t5.decoder", "t5.layers", "t5.masks", "t5.network", "t5.stacks"),
  *("training.losses", "training.objectives"),
)


def _check_annotations() -> None:
  # The calibration tests also run where none of these is installed.
  if all(importlib.util.find_spec(name) for name in ("jax", "jaxtyping", "beartype")):
    import jaxtyping

    jaxtyping.install_import_hook([f"calm.{name}" for name in CHECKED], "beartype.beartype")


_check_annotations()


# Files that are about what happens around compiled programs, not in them: LLVM need not try
# hard there. What compares numbers with others' or with the paper's is compiled as users do.
QUICK = (
  "inference/platform_test.py",
  *("commands/cli_test.py", "commands/infer_test.py", "commands/pipeline_test.py"),
  *(
    "fitting/run_test.py",
    "fitting/stages_test.py",
    "fitting/training_test.py",
    "inference/calibrating_test.py",
  ),
  *("inference/grid_test.py", "inference/until_certified_test.py"),
  *("fitting/heads_test.py", "inference/exact_test.py", "inference/seconds_test.py"),
  *("paper/bench/engine_test.py", "training/run_test.py"),
)


@pytest.fixture(autouse=True, scope="module")
def programs(request):
  """How hard a module's programs are compiled; and they go when its tests have run.

  A compiled program maps memory in many pieces, of which a process may have 65,530.
  """
  quick = str(request.path).endswith(QUICK)
  if quick:
    jax = importlib.import_module("jax")
    jax.config.update("jax_disable_most_optimizations", True)
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()
  if quick:
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch, tmp_path_factory):
  """A command keeps its compiled programs on disk for its own test, and not at home."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
  yield
  jax = sys.modules.get("jax")
  if jax is not None and jax.config.jax_compilation_cache_dir is not None:
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def promotion(request):
  """Strict promotion is for our functions; tests of other frameworks' code are excused."""
  foreign = any(request.node.get_closest_marker(name) for name in ("hf", "t5x", "tf"))
  with contextlib.ExitStack() as stack:
    if foreign and "jax" in sys.modules:
      import jax

      stack.enter_context(jax.numpy_rank_promotion("allow"))
      stack.enter_context(jax.numpy_dtype_promotion("standard"))
    yield


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The three Debian data sets, or a skip that says how to get them."""
  path = pathlib.Path(os.environ.get("CALM_DATA", REPOSITORY.parent / "shared" / "data"))
  if not path.is_dir():
    pytest.skip(f"needs the Debian data sets: set CALM_DATA to their folder (looked in {path})")
  return path
