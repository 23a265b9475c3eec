"""The package as a whole: what importing it loads, and that its map is right."""

import importlib
import pkgutil
import subprocess
import sys

from calm import calibrate

HEAVY = (
  "jax",
  "flax",
  "tensorflow",
  "seqio",
  "t5x",
  "rouge_score",
  "sacrebleu",
  "nltk",
  "absl",
)


def loaded_by(code):
  check = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
  found = subprocess.run(
    [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True
  )
  return found.stdout.strip()


def test_importing_it_loads_numpy_and_scipy_alone():
  found = pkgutil.walk_packages(calibrate.__path__, "calm.calibrate.")
  modules = [module.name for module in found]
  assert len(modules) > 10
  assert loaded_by("import " + ", ".join(modules)) == "[]"


def test_the_check_can_fail():
  code = "from calm.calibrate import metrics; metrics.chrf('a', ['b'])"
  assert loaded_by(code) == "['sacrebleu']"


def test_its_names_are_there():
  assert len(set(calibrate.__all__)) == len(calibrate.__all__) > 10
  for name in calibrate.__all__:
    assert hasattr(calibrate, name) or importlib.import_module(f"calm.calibrate.{name}")
