"""Every gin file parses, finalises, and describes the model that its header
says.
"""

import pathlib
import re

import pytest

gin = pytest.importorskip("gin")

from calm.commands import run as run_lib

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
MACROS = (
  *("DATA", "INITIAL", "TRAIN", "VALIDATION", "VOCABULARY_PATH"),
  *(
    "VOCABULARY",
    "OUTPUT_DIR",
    "MODEL",
    "WEIGHTS",
    "PROMPTS",
    "OUTPUTS",
    "OWN",
  ),
)


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  gin.add_config_file_search_path(str(REPOSITORY))
  yield
  gin.clear_config()


def text_of(path):
  """A gin file's text with that of the files it includes."""
  text = path.read_text("utf-8")
  included = re.findall(r'^include "(configs/.+)"$', text, re.MULTILINE)
  return "\n".join([text, *(text_of(REPOSITORY / name) for name in included)])


def marked(path):
  needs_seqio = "tasks" in path.parts
  name = str(path.relative_to(CONFIGS))
  return pytest.param(
    path, id=name, marks=[pytest.mark.tf] if needs_seqio else []
  )


def of_t5x(path):
  """Whether a file is for T5X's own scripts; `tests/t5x/configs_test.py` parses
  those.
  """
  return "runs" in path.parts


OURS = [path for path in sorted(CONFIGS.rglob("*.gin")) if not of_t5x(path)]


@pytest.mark.parametrize("path", [marked(path) for path in OURS])
def test_parses_and_finalises(path):
  if "tasks" in path.parts:
    pytest.importorskip(
      "seqio", reason="seqio (the `train` extra) is not installed"
    )
  text = text_of(path)
  assert text.startswith("#"), "a header says what to be set"
  required = [
    n for n in MACROS if re.search(rf"%{n}\b|^{n} = %gin", text, re.MULTILINE)
  ]
  # A header may bind a macro in its example.
  given = [
    name
    for name in required
    if not re.search(rf"^{name} = @", text, re.MULTILINE)
  ]
  gin.parse_config_files_and_bindings(
    [str(path)], [f"{name} = 'x'" for name in given]
  )
  if "train" in path.parts:  # as `calm train` takes it
    run_lib.refuse_unread_macros()
  header = text.split("from __gin__")[0]
  for name in (n for n in MACROS if f"{n} = %gin.REQUIRED" in text):
    assert name in header, f"{name} must be set, and the header does not say so"


def test_gin_files_and_the_adapter_could_be_merged_into_t5x():
  """The licence's header, and 80 columns."""
  licence = (
    (CONFIGS / "runs" / "early_exit.gin").read_text("utf-8").split("\n\n")[0]
  )
  assert "Licensed under the Apache License, Version 2.0" in licence
  paths = [*CONFIGS.rglob("*.gin"), *(REPOSITORY / "calm" / "t5x").glob("*.py")]
  texts = {path: path.read_text("utf-8") for path in paths}
  assert len(texts) > 40
  assert [
    path for path, text in texts.items() if not text.startswith(licence)
  ] == []
  wide = [
    path
    for path, text in texts.items()
    if max(map(len, text.splitlines())) > 80
  ]
  assert wide == []
