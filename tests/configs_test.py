"""Every gin file parses, finalises, and describes the model that its header says."""

import pathlib
import re

import numpy as np
import pytest

gin = pytest.importorskip("gin")

from calm.commands import run as run_lib
from calm.t5 import network, parameters

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
MACROS = (
  *("DATA", "INITIAL", "TRAIN", "VALIDATION", "VOCABULARY_PATH"),
  *("VOCABULARY", "OUTPUT_DIR", "MODEL", "WEIGHTS", "PROMPTS", "OUTPUTS", "OWN"),
)
# Public figures of the T5 1.1 checkpoints; the exit classifier adds emb_dim + 1.
NUM_PARAMETERS = {"small": 76_961_152, "base": 247_577_856, "large": 783_150_080}


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
  return pytest.param(path, id=name, marks=[pytest.mark.tf] if needs_seqio else [])


def of_t5x(path):
  """Whether a file is for T5X's own scripts; `tests/t5x/configs_test.py` parses those."""
  return "t5x" in text_of(path) and "tasks" not in path.parts


OURS = [path for path in sorted(CONFIGS.rglob("*.gin")) if not of_t5x(path)]


@pytest.mark.parametrize("path", [marked(path) for path in OURS])
def test_parses_and_finalises(path):
  if "tasks" in path.parts:
    pytest.importorskip("seqio", reason="seqio (the `train` extra) is not installed")
  text = text_of(path)
  assert text.startswith("#"), "a header says what to be set"
  required = [n for n in MACROS if re.search(rf"%{n}\b|^{n} = %gin", text, re.MULTILINE)]
  # A header may bind a macro in its example.
  given = [name for name in required if not re.search(rf"^{name} = @", text, re.MULTILINE)]
  gin.parse_config_files_and_bindings([str(path)], [f"{name} = 'x'" for name in given])
  if "runs" in path.parts:  # as `calm train` takes it
    run_lib.refuse_unread_macros()
  header = text.split("from __gin__")[0]
  for name in (n for n in MACROS if f"{n} = %gin.REQUIRED" in text):
    assert name in header, f"{name} must be set, and the header does not say so"


def config_of(name):
  gin.parse_config_files_and_bindings([str(CONFIGS / "models" / f"{name}.gin")], [])
  return gin.get_configurable(network.Transformer)().config


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "packed"])
def test_models_are_networks(name):
  config = config_of(name)
  assert isinstance(config, network.T5Config)
  shapes = parameters.expected_shapes(config)
  total = sum(int(np.prod(shape)) for shape in shapes.values())
  if name in NUM_PARAMETERS:
    assert total == NUM_PARAMETERS[name] + config.emb_dim + 1


def test_models_bind_nothing_but_the_network():
  for path in sorted((CONFIGS / "models").glob("*.gin")):
    gin.clear_config()
    gin.parse_config_files_and_bindings([str(path)], [])
    bound = {line.split(".")[0] for line in gin.config_str().splitlines() if " = " in line}
    assert bound <= {"network", "T5Config", "Transformer"}, path
