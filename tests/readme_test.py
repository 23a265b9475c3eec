"""The README's examples run as they stand."""

import contextlib
import io
import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[str]:
  return re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_there_are_examples():
  assert len(python_blocks()) >= 2


@pytest.mark.parametrize("index", range(len(python_blocks())))
def test_example_runs(index):
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(python_blocks()[index], f"README.md block {index}", "exec"), {})
  assert printed.getvalue().strip()
