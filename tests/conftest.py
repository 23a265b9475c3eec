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
  *("data.prompt_batches", "decode.loop", "decode.pool"),
  *("decode.program", "exits.confidence", "exits.propagation", "exits.rules"),
  *("exits.schedules", "inference.options", "inference.outputs", "inference.predictor"),
  *(
    "inference.batch_decoder",
    "t5.decoder",
    "t5.layers",
    "t5.network",
  ),
  *("training.losses", "training.objectives"),
)


def _check_annotations() -> None:
  # The calibration tests also run where none of these is installed.
  if all(importlib.util.find_spec(name) for name in ("jax", "jaxtyping", "beartype")):
    import jaxtyping

    jaxtyping.install_import_hook([f"calm.{name}" for name in CHECKED], "beartype.beartype")


_check_annotations()


# Files that take longest, these first: else one of two workers ends long after the other.
LONGEST = (
  *("decode/program_test.py", "paper/bench_test.py", "fitting/train_test.py"),
  *("training/loop_test.py", "commands/pipeline_test.py", "inference/predictor_test.py"),
  *("checkpoints/huggingface_test.py", "training/objectives_test.py", "training/run_test.py"),
  *("fitting/run_test.py", "decode/program_reference_test.py", "t5/network_golden_test.py"),
  *("decode/speculative_test.py", "decode/sharded_test.py"),
)


def pytest_collection_modifyitems(items):
  place = lambda item: [str(item.path).endswith(name) for name in LONGEST]
  items.sort(key=place, reverse=True)


# Files that are about what programs do, not how fast or by which instructions. What compares
# numbers with others' or with the paper's, or reads HLO, is compiled as users do.
QUICK = (
  *("commands/calibrate_command_test.py", "commands/cli_test.py", "commands/gin_test.py"),
  *("commands/infer_test.py", "commands/options_test.py"),
  *("commands/pipeline_test.py", "commands/reading_test.py", "commands/run_test.py"),
  *("commands/sharding_test.py", "commands/stopped_test.py"),
  *("decode/loop_test.py",),
  *("decode/pool_test.py", "decode/program_reference_test.py"),
  *("decode/resume_test.py", "decode/staged_test.py", "engines/choice_test.py"),
  *("engines/layout_test.py",),
  *("exits/confidence_test.py", "exits/rules_test.py", "fitting/exit_maps_test.py"),
  *("fitting/choose_test.py", "fitting/run_test.py", "fitting/train_test.py"),
  *("inference/calibrating_test.py", "inference/grid_test.py"),
  *("inference/platform_test.py", "inference/seconds_test.py"),
  *("inference/online_test.py",),
  *("paper/bench_test.py", "scripts/benchmark_test.py"),
  *("t5/costs_test.py", "t5/decoder_test.py"),
  *("t5/growing_test.py", "t5/network_test.py"),
  *("t5x/loops_test.py", "training/distillation_test.py", "training/loop_test.py"),
  *("training/losses_test.py", "training/objectives_test.py", "training/run_test.py"),
)
# LLVM need not try hard, and XLA's older code generator takes two thirds of the newer's time.
QUICKLY = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
}


def compile_quickly(patch: pytest.MonkeyPatch) -> None:
  """Programs are compiled in as little time as XLA allows, those of started processes too."""
  # JAX has no public name for options of XLA that hold for all programs of a process.
  compiler = importlib.import_module("jax._src.compiler")
  options = compiler.get_compile_options

  def quick_options(*args, env_options_overrides=None, **kwargs):
    overrides = QUICKLY | dict(env_options_overrides or {})
    return options(*args, env_options_overrides=overrides, **kwargs)

  patch.setattr(compiler, "get_compile_options", quick_options)
  importlib.import_module("jax").devices()  # by now this process has read its own flags
  emitters = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
  patch.setenv("XLA_FLAGS", emitters.strip())
  patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


@pytest.fixture(autouse=True, scope="module")
def programs(request):
  """How hard a module's programs are compiled; and they go when its tests have run.

  A compiled program maps memory in many pieces, of which a process may have 65,530.
  """
  with pytest.MonkeyPatch.context() as patch:
    if str(request.path).endswith(QUICK):
      compile_quickly(patch)
    yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()


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
