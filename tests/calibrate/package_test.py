"""What importing the package loads."""

import pkgutil
import subprocess
import sys

from calm import calibrate

HEAVY = [
  "jax",
  "flax",
  "tensorflow",
  "seqio",
  "t5x",
  "rouge_score",
  "sacrebleu",
  "nltk",
  "absl",
]


def loaded_by(code):
  check = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
  run = [sys.executable, "-c", f"{code}\n{check}"]
  return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_it_loads_numpy_and_scipy_alone():
  found = pkgutil.walk_packages(calibrate.__path__, "calm.calibrate.")
  modules = [module.name for module in found]
  assert len(modules) > 10
  assert loaded_by("import " + ", ".join(modules)) == "[]"
  code = "from calm.calibrate import metrics; metrics.chrf('a', ['b'])"
  assert loaded_by(code) == "['sacrebleu']"  # the check can fail
