"""What every command does alike: one true line, whatever ends it."""

import argparse
import os
import re
import signal
import time

import gin
import pytest

from calm.commands import common, gin_files


@pytest.fixture(autouse=True)
def clean():
  gin.clear_config()  # whatever a test before left, locked
  yield
  gin.clear_config()


def ended(capsys, run, **arguments) -> tuple[int, str]:
  code = common.user_errors(run)(argparse.Namespace(**arguments))
  return code, capsys.readouterr().err


@pytest.mark.parametrize(
  ("text", "unread"),
  [
    ("A = 1\nB = %A\njson.dumps.indent = %B", []),
    ("A = 1\njson.dumps.indent = [{'x': (%A,)}]", []),
    ("INITIAL = 'model'\njson.dumps.indent = 2", ["INITIAL"]),
    ("A = 1\nB = 2\njson.dumps.indent = %A", ["B"]),
  ],
)
def test_macros_that_nothing_reads_are_refused(text, unread):
  gin.parse_config(f"from __gin__ import dynamic_registration\nimport json\n{text}")
  if not unread:
    gin_files.refuse_unread_macros()
    return
  with pytest.raises(ValueError, match=rf"got {', '.join(unread)}, which nothing reads"):
    gin_files.refuse_unread_macros()


def test_a_command_reads_its_own_gin_files_alone(tmp_path, capsys):
  """Whatever this process has bound before, and locked."""
  from calm.commands import cli

  (tmp_path / "mine.gin").write_text("import nothing_of_this_name\n")
  words = ["train", f"--gin_file={tmp_path / 'mine.gin'}", f"--output_dir={tmp_path / 'run'}"]
  asked = argparse.Namespace(gin_search_paths="", gin_file=[], gin_bindings=["MINE = 2"])

  gin.parse_config("OTHERS = 1")
  gin.finalize()
  assert cli.main(words) == 2
  told = capsys.readouterr().err
  assert "nothing_of_this_name" in told and "locked" not in told

  gin.parse_config("OTHERS = 1")
  gin.finalize()
  gin_files.parse(asked)
  assert "OTHERS" not in gin.config_str() and gin.query_parameter("MINE/gin.macro.value") == 2


@pytest.mark.parametrize(
  ("number", "command", "code", "line"),
  [
    (signal.SIGTERM, "generate", 143, "what was decoded is kept"),
    (signal.SIGINT, "train", 130, "goes on from its last checkpoint"),
    (signal.SIGTERM, "calibrate", 143, "files that were there are as they were"),
  ],
)
def test_signals_end_a_command_with_one_line(capsys, number, command, code, line):
  before = signal.getsignal(signal.SIGTERM)
  # A shell starts what it puts into the background with SIGINT ignored.
  interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)

  def run(arguments):
    os.kill(os.getpid(), number)
    time.sleep(5)
    pytest.fail("the signal did nothing")

  try:
    got, err = ended(capsys, run, command=command)
  finally:
    signal.signal(signal.SIGINT, interrupts)
  assert got == code and line in err and err.count("\n") == 1
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (ValueError("a \x1b[2J path \u202e"), r"a \x1b[2J path \u202e"),
    (MemoryError(), "that fit the memory"),
    (
      RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"),
      "that fit the memory",
    ),
    (RecursionError("maximum"), "too many in one another"),
  ],
)
def test_errors_are_one_line_without_effects(capsys, error, words):
  def run(arguments):
    raise error

  code, err = ended(capsys, run)
  assert code == 2 and words in err and err.count("\n") == 1


def test_what_is_no_mistake_of_the_users_keeps_its_traceback():
  def run(arguments):
    raise RuntimeError("a bug")

  with pytest.raises(RuntimeError, match="a bug"):
    common.user_errors(run)(argparse.Namespace())


FILES = {
  "syntax.gin": ("a.b = (1,\n", r"syntax\.gin:\d"),
  "unknown.gin": ("\nnot_configurable.x = 3\n", r"unknown\.gin:2: .*not_configurable"),
  "self.gin": ("include 'self.gin'\n", "include themselves"),
  "passwd.gin": ("include '/etc/passwd'\n", r"/etc/passwd:1"),
  "module.gin": ("import no_such_module_here\n", "no_such_module_here"),
  "missing.gin": ("include 'nowhere.gin'\n", "nowhere.gin"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_gin_file_is_one_line_with_its_place(tmp_path, capsys, name):
  for other, (text, _) in FILES.items():
    (tmp_path / other).write_text(text)
  arguments = argparse.Namespace(
    gin_file=[str(tmp_path / name)], gin_bindings=[], gin_search_paths=str(tmp_path)
  )
  code, err = ended(capsys, lambda _: gin_files.parse(arguments))
  assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
  assert re.search(FILES[name][1], err), err


@pytest.mark.parametrize("binding", ["x", "a.b = ", "nobody.knows = 1", "= 3", "a.b = @c("])
def test_a_bad_binding_is_one_line(capsys, binding):
  arguments = argparse.Namespace(gin_file=[], gin_bindings=[binding], gin_search_paths="")
  code, err = ended(capsys, lambda _: gin_files.parse(arguments))
  assert code == 2 and err.count("\n") == 1 and "--gin_bindings" in err, err
