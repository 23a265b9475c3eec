"""Every README's Python runs, its links lead somewhere, and the first page is
short.
"""

import contextlib
import io
import pathlib
import re
import shlex

import pytest

from calm.commands import cli
from calm.commands import run as run_lib
from calm.data import prompt_files

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


@pytest.mark.parametrize(
  ("where", "code"), blocks(), ids=[where for where, _ in blocks()]
)
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
  assert not [
    line
    for line in lines
    if len(line) > 100 and not line.startswith(("|", "<sub>"))
  ]


def test_links_and_paths_lead_to_files():
  gone = []
  for path in (
    *READMES,
    *(ROOT / "configs").rglob("*.gin"),
    *(ROOT / "calm").rglob("*.py"),
  ):
    text = path.read_text("utf-8")
    prose = (
      re.sub(r"```.*?```", "", text, flags=re.DOTALL)
      if path.suffix == ".md"
      else ""
    )
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", prose):
      gone += [] if (path.parent / link).exists() else [f"{path.name}: {link}"]
    named = (
      r"(?<![\w/.$}-])(?:calm|configs|scripts|tests)/[\w./-]+"
      r"\.(?:py|md|gin|sh|json)\b"
    )
    for name in re.findall(named, text):
      gone += (
        []
        if (ROOT / name).exists() or "NAME" in name
        else [f"{path.name}: {name}"]
      )
  assert gone == []


def commands(path: pathlib.Path) -> list[list[str]]:
  """The words of every `calm` command of a page's shell blocks, comments left
  out.
  """
  found = re.findall(r"```sh\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
  lines = "\n".join(found).replace("\\\n", " ").splitlines()
  words = [shlex.split(line.split("|")[-1], comments=True) for line in lines]
  return [line[1:] for line in words if line[:1] == ["calm"]]


def test_every_command_of_the_first_page_is_one():
  given = commands(ROOT / "README.md")
  assert {line[0] for line in given} >= {
    "fit",
    "generate",
    "calibrate",
    "infer",
    "train",
  }
  for line in given:
    cli.make_parser(line[0]).parse_args(line[1:])


def test_the_first_pages_training_has_all_it_needs(monkeypatch):
  gin = pytest.importorskip(
    "gin", reason="gin-config (the `train` extra) is not installed"
  )
  monkeypatch.chdir(ROOT)
  (line,) = (
    line for line in commands(ROOT / "README.md") if line[0] == "train"
  )
  arguments = cli.make_parser(line[0]).parse_args(line[1:])
  assert arguments.output_dir
  try:
    run_lib.parse_gin(arguments)
    assert prompt_files.open_prompts(gin.query_parameter("%TRAIN"))
    assert pathlib.Path(gin.query_parameter("%VOCABULARY_PATH")).is_file()
  finally:
    gin.clear_config()
