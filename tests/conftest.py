"""Test-wide strictness: CPU only, no promotion by accident, annotated shapes
are checked.
"""

import contextlib
import gc
import importlib.util
import os
import re
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# JAX reads these when it is first imported: fixtures of any scope are under
# them.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")

# Modules whose jaxtyping annotations are checked at every call (`calibrate` has
# none).
CHECKED = (
  *("data.prompt_batches", "decode.loop"),
  *("decode.program", "exits.confidence", "exits.propagation", "exits.rules"),
  *(
    "exits.schedules",
    "inference.options",
    "inference.outputs",
    "inference.predictor",
  ),
  *("t5.decoder", "t5.layers", "t5.network"),
  *("training.losses", "training.objectives"),
)


def _check_annotations() -> None:
  # The calibration tests also run where none of these is installed.
  if all(
    importlib.util.find_spec(name) for name in ("jax", "jaxtyping", "beartype")
  ):
    import jaxtyping

    jaxtyping.install_import_hook(
      [f"calm.{name}" for name in CHECKED], "beartype.beartype"
    )


_check_annotations()


# Files that take longest, these first: else one of two workers ends long after
# the other.
LONGEST = (
  *("fitting/run_test.py", "decode/program_test.py", "decode/hlo_test.py"),
  *(
    "serve/serve_test.py",
    "training/loop_test.py",
    "training/objectives_test.py",
  ),
  *("t5/kernels_test.py", "training/run_test.py", "decode/engines_test.py"),
  *(
    "paper/bench_test.py",
    "fitting/exit_maps_test.py",
    "decode/staged_test.py",
  ),
)


def pytest_collection_modifyitems(items):
  def place(item):
    return [str(item.path).endswith(name) for name in LONGEST]

  items.sort(key=place, reverse=True)


# Rooms and files that are about what programs do, not how fast or by which
# instructions. What reads HLO is compiled as users do, and so is the smoke
# group.
QUICK = re.compile(
  r"/tests/(commands/|fitting/|paper/|scripts/|serve/|checkpoints/|readme_test"
  r"|decode/(engines|layout|loop|program|resume|speculative|staged)_test"
  r"|exits/(confidence|rules)_test"
  r"|inference/(arguments|calibrating|drafts|platform|predictor|reference)_test"
  r"|t5/(costs|decoder|eight_bits|kernels|layers|network|network_golden)_test|t5x/loops_test"
  r"|training/(distillation|loop|losses|objectives|run)_test)"
)
# LLVM need not try hard, and XLA's older code generator takes two thirds of the
# newer's time.
QUICKLY = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
}


def compile_quickly(patch: pytest.MonkeyPatch) -> None:
  """Programs are compiled in as little time as XLA allows, those of started
  processes too.
  """
  # JAX has no public name for options of XLA that hold for all programs of a
  # process.
  compiler = importlib.import_module("jax._src.compiler")
  options = compiler.get_compile_options

  def quick_options(*args, env_options_overrides=None, **kwargs):
    overrides = QUICKLY | dict(env_options_overrides or {})
    return options(*args, env_options_overrides=overrides, **kwargs)

  patch.setattr(compiler, "get_compile_options", quick_options)
  # by now this process has read its own flags
  importlib.import_module("jax").devices()
  emitters = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
  )
  patch.setenv("XLA_FLAGS", emitters.strip())
  patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


def keep_programs(folder: str | None) -> None:
  """Compiled programs are read back from a folder; None: from none."""
  jax = sys.modules["jax"]
  cache = importlib.import_module(
    "jax.experimental.compilation_cache.compilation_cache"
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if jax.config.jax_compilation_cache_dir != folder:
    jax.config.update("jax_compilation_cache_dir", folder)
    cache.reset_cache()


@pytest.fixture(scope="session")
def kept_programs(tmp_path_factory):
  """The folder of this process's quick programs: the same toys are decoded in
  many files.
  """
  return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(autouse=True, scope="module")
def programs(request, kept_programs):
  """How hard a module's programs are compiled; and they go when its tests have
  run.

  A compiled program maps memory in many pieces, of which a process may have
  65,530.
  """
  folder = kept_programs if QUICK.search(str(request.path)) else None
  with pytest.MonkeyPatch.context() as patch:
    if folder:
      compile_quickly(patch)
    if "jax" in sys.modules:
      keep_programs(folder)
    yield folder
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path_factory, programs):
  """A command keeps its compiled programs where a quick module's are, and not
  at home.
  """
  monkeypatch.setenv(
    "XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache")
  )
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  if "jax" in sys.modules:
    keep_programs(programs)


@pytest.fixture
def cache_in_tmp(monkeypatch, tmp_path, kept):
  """A cache of compiled programs for one test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  keep_programs(None)


@pytest.fixture(autouse=True)
def promotion(request):
  """Strict promotion is for our functions; tests of other frameworks' code are
  excused.
  """
  foreign = any(
    request.node.get_closest_marker(name) for name in ("hf", "t5x", "tf")
  )
  with contextlib.ExitStack() as stack:
    if foreign and "jax" in sys.modules:
      import jax

      stack.enter_context(jax.numpy_rank_promotion("allow"))
      stack.enter_context(jax.numpy_dtype_promotion("standard"))
    yield


@pytest.fixture
def collect_orphans():
  """Orbax leaves event loops without an owner: they go here, where warnings are
  ignored.
  """
  yield
  gc.collect()


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
  """A toy's folder."""
  from tests.inference import predictor_test

  return predictor_test.save(tmp_path_factory.mktemp("model") / "toy")
