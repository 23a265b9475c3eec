"""The package as a whole: what importing it loads, and that its map is right."""

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
  modules = ["audit", "foreign", "generation_writer", "pareto", "reuse", "sequential", "trials"]
  code = "import calm.calibrate\n" + "\n".join(f"import calm.calibrate.{m}" for m in modules)
  assert loaded_by(code) == "[]"


def test_the_check_can_fail():
  assert loaded_by("from calm.calibrate import metrics; metrics._chrf()") == "['sacrebleu']"


def test_its_names_are_there():
  assert len(set(calibrate.__all__)) == len(calibrate.__all__) > 10
  assert all(hasattr(calibrate, name) for name in calibrate.__all__)
