import io
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from calm.calibrate.losses import metric_values, metrics

ROUGE = metrics.METRICS["rouge_l"]
PAIRS = [(f"a b {i % 7}", (f"a c {i % 5}",)) for i in range(600)]


def test_equal_pairs_are_computed_once():
  asked = []

  def function(prediction, references):
    asked.append((prediction, references))
    return 0.5

  metric_values.compute(metrics.Metric("counting", function), PAIRS)
  assert len(asked) == len(set(asked)) == 35
  assert metric_values.compute(ROUGE, []).shape == (0,)


def test_processes_give_the_same_numbers_in_the_same_order():
  different = [(f"a b {i}", (f"a c {i % 5} b",)) for i in range(450)]
  seen = []
  ours = metric_values.compute(ROUGE, different, workers=1)
  theirs = metric_values.compute(
    ROUGE, different, workers=2, progress=lambda done, total: seen.append((done, total))
  )
  np.testing.assert_array_equal(ours, theirs)
  assert ours.tolist() == [ROUGE(*pair) for pair in different]
  assert seen[0] == (200, 450) and seen[-1] == (450, 450) and seen == sorted(seen)


def process_id(prediction, references):
  del references
  time.sleep(0.001)
  return os.getpid() / 2**32 if prediction.startswith("x") else float(prediction)


def test_processes_start_when_the_work_left_is_worth_it(monkeypatch):
  metric = metrics.get_metric(f"{__name__}:process_id")
  pairs = [(f"x{i}", ("",)) for i in range(205)]
  own = os.getpid() / 2**32
  assert set(metric_values.compute(metric, pairs)) == {own}
  monkeypatch.setattr(metric_values, "_WORTH_SECONDS", 1e-4)
  monkeypatch.setattr(os, "cpu_count", lambda: 2)
  found = metric_values.compute(metric, pairs)
  assert set(found[:200]) == {own} and own not in found[200:]


def test_functions_without_an_import_path_stay_in_this_process():
  pairs = [(f"x{i}", ("",)) for i in range(205)]
  own = os.getpid() / 2**32
  for metric in (
    metrics.Metric("anything", process_id),
    metrics.Metric("rouge_l", process_id),
    metrics.Metric("__main__:process_id", process_id),
    # Names of other functions, or of a module that is not loaded: only this one may run.
    metrics.Metric(f"{__name__}:test_equal_pairs_are_computed_once", process_id),
    metrics.Metric("not_loaded_yet:process_id", process_id),
    metrics.Metric("shutil:rmtree", process_id),
  ):
    assert set(metric_values.compute(metric, pairs, workers=2)) == {own}


def test_an_error_in_a_child_is_reported():
  metric = metrics.get_metric(f"{__name__}:process_id")
  pairs = [(f"x{i}", ("",)) for i in range(200)] + [("3.0", ("",))] * 2
  with pytest.raises(
    ValueError, match=r"got a child process that failed: ValueError: .*to lie in"
  ):
    metric_values.compute(metric, pairs, workers=2)


def test_the_childs_side_answers_line_by_line(monkeypatch):
  lines = [b'[["a b", ["a b"]], ["a", ["b"]]]\n', b"[]\n"]
  monkeypatch.setattr("sys.argv", ["child", "rouge_l"])
  monkeypatch.setattr("sys.stdin", type("Input", (), {"buffer": lines}))
  metric_values.serve(answers := io.StringIO())
  assert answers.getvalue() == "[1.0, 0.0]\n[]\n"


def test_the_folder_that_one_is_in_is_no_module_path(tmp_path):
  for name in ("scipy", "numpy", "unicodedata2", "json", "calm"):
    (tmp_path / f"{name}.py").write_text("open('imported', 'w').close()\n")
  (tmp_path / "own.py").write_text(
    "def same(text, references): return float(text == references[0])\n"
  )
  code = (
    "import os, sys, numpy; from calm.calibrate.losses import metric_values, metrics\n"
    f"os.chdir({str(tmp_path)!r}); sys.path.insert(0, '')\n"
    "pairs = [(f'x{i}', (f'x{i % 203}',)) for i in range(206)]\n"
    "for name in ('rouge_l', './own.py:same'):\n"
    "  metric = metrics.get_metric(name)\n"
    "  print(metric_values.compute(metric, pairs, workers=2).sum())"
  )
  done = subprocess.run(
    [sys.executable, "-P", "-c", code],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])},
  )
  assert done.stdout == "203.0\n203.0\n", done.stderr
  assert not (tmp_path / "imported").exists()


PRINTING = """
import os, sys
print(7)
os.write(1, b"of the system\\n")

def score(text, references):
  print("[0.0]", flush=True)
  return float(text[1:]) / 1000
"""


@pytest.mark.parametrize("named", ["{folder}/printing_one.py:score", "printing_two:score"])
def test_a_metric_may_print_in_a_child_too(named, tmp_path, monkeypatch, capfd):
  for name in ("printing_one", "printing_two"):
    (tmp_path / f"{name}.py").write_text(PRINTING)
  monkeypatch.syspath_prepend(str(tmp_path))
  metric = metrics.get_metric(named.format(folder=tmp_path))
  pairs = [(f"x{i}", ("",)) for i in range(400)]
  alone = metric_values.compute(metric, pairs, workers=1)
  capfd.readouterr()
  np.testing.assert_array_equal(metric_values.compute(metric, pairs, workers=2), alone)
  assert capfd.readouterr().out == "[0.0]\n" * 200, "of the pairs that were made here"


@pytest.mark.parametrize("answer", ["hello", "7.5", "[1.0]", "[0.5, null]", "[true, 0.5]"])
def test_an_answer_that_is_none_is_told_of(answer, monkeypatch):
  child = f"import sys\nfor line in sys.stdin: print({answer!r}, flush=True)"
  monkeypatch.setattr(metric_values, "_CHILD", child)
  pairs = [(f"x{i}", ("",)) for i in range(204)]
  message = rf"'rouge_l' to answer 2 numbers, got '{re.escape(answer)}'; mend the function"
  with pytest.raises(ValueError, match=message):
    metric_values.compute(ROUGE, pairs, workers=2)
