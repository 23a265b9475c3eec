"""What every command does alike: one true line, whatever ends it."""

import argparse
import os
import pathlib
import re
import signal
import stat

import gin
import pytest

from calm import signals
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
  steps = []

  def run(arguments):
    os.kill(os.getpid(), number)
    steps.append("whole")  # what is being done is done
    signals.check()
    steps.append("another")

  try:
    got, err = ended(capsys, run, command=command)
  finally:
    signal.signal(signal.SIGINT, interrupts)
  assert got == code and line in err and err.count("\n") == 1 and steps == ["whole"]
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
    (RuntimeError("Unable to initialize backend 'bogus': not known"), "Expected JAX_PLATFORMS"),
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


def cache_folder():
  import jax

  common.use_compilation_cache()
  return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("given", ["", "cache", ".", "../cache"])
def test_compiled_programs_are_never_read_from_the_working_directory(
  given, cache_in_tmp, tmp_path, monkeypatch
):
  home = tmp_path / "home"
  (here := tmp_path / "here").mkdir()
  monkeypatch.chdir(here)
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setenv("XDG_CACHE_HOME", given)
  assert cache_folder() == str(home / ".cache" / "calm" / "xla")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert cache_folder() == str(home / ".cache" / "calm" / "xla")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert cache_folder() == str(tmp_path / "xdg" / "calm" / "xla")
  assert not list(here.iterdir())


def test_a_new_cache_is_its_users_alone_whatever_the_umask(cache_in_tmp, tmp_path):
  before = os.umask(0)
  try:
    made = pathlib.Path(cache_folder())
  finally:
    os.umask(before)
  for folder in (made, made.parent):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert cache_folder() == str(made)


@pytest.mark.parametrize(
  ("place", "mode", "refused"),
  [
    ("xdg/calm/xla", 0o775, True),
    ("xdg/calm/xla", 0o757, True),
    ("xdg/calm/xla", 0o1777, True),
    ("xdg/calm", 0o777, True),
    ("xdg", 0o777, True),  # anybody may put another `calm` there
    ("xdg", 0o1777, False),  # as /tmp
    ("xdg/calm/xla", 0o755, False),
    ("xdg/calm", 0o755, False),
  ],
)
def test_a_cache_that_others_may_write_is_refused(place, mode, refused, cache_in_tmp, tmp_path):
  cache_folder()
  (tmp_path / place).chmod(mode)
  if not refused:
    assert cache_folder() == str(tmp_path / "xdg" / "calm" / "xla")
    return
  with pytest.raises(ValueError, match=rf"Expected '.*{place}' to be .* by you alone, got"):
    cache_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders to others")
@pytest.mark.parametrize("place", ["xdg/calm/xla", "xdg/calm"])
def test_a_cache_of_another_user_is_refused(place, cache_in_tmp, tmp_path):
  cache_folder()
  os.chown(tmp_path / place, 12345, -1)
  with pytest.raises(ValueError, match=r"by you alone, got .* user 12345"):
    cache_folder()


def test_a_home_that_cannot_be_written_leaves_the_cache_out(
  cache_in_tmp, tmp_path, monkeypatch
):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  cache_folder()
