"""Every README's Python runs, its links lead somewhere, and the first page is short."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
READMES = [
  ROOT / "README.md",
  *(
    path
    for room in ("calm", "configs", "scripts", ".github")
    for path in (ROOT / room).rglob("*.md")
  ),
]


def blocks():
  """(where, code) of every Python block."""
  return [
    (f"{path.relative_to(ROOT)}:{number}", code)
    for path in READMES
    for number, code in enumerate(
      re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    )
  ]


def test_there_are_examples():
  assert sum(where.startswith("README.md") for where, _ in blocks()) >= 2


@pytest.mark.parametrize(("where", "code"), blocks(), ids=[where for where, _ in blocks()])
def test_example_runs(where, code, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code, where, "exec"), {})
  assert printed.getvalue().strip()


def test_the_first_page_is_short():
  lines = (ROOT / "README.md").read_text("utf-8").splitlines()
  assert len(lines) <= 150
  # A table's row and its source are made by scripts/tables.py.
  assert not [line for line in lines if len(line) > 100 and not line.startswith(("|", "<sub>"))]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_to_files(path):
  text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
  links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
  named = re.findall(r"`((?:calm|configs|scripts|tests)/[\w./-]+\.\w+)`", text)
  for link in links:
    assert (path.parent / link).exists(), f"{path.name}: {link}"
  for name in named:
    if "NAME" in name:
      continue
    assert (ROOT / name).exists(), f"{path.name}: {name}"
