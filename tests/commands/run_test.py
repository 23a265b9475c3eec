"""What every command does alike: one true line, whatever ends it; commands that
work.
"""

import argparse
import os
import pathlib
import re
import stat

import gin
import pytest

from calm.commands import run as run_lib


@pytest.fixture(autouse=True)
def clean():
  gin.clear_config()  # whatever a test before left, locked
  yield
  gin.clear_config()


def ended(capsys, run, **arguments) -> tuple[int, str]:
  code = run_lib.guarded(run, argparse.Namespace(**arguments))
  return code, capsys.readouterr().err


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (ValueError("a \x1b[2J path \u202e"), r"a \x1b[2J path \u202e"),
    (MemoryError(), "does not fit the memory"),
    (
      RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
      "does not fit the memory",
    ),
    (RecursionError("maximum"), "too deep in one another"),
    (
      RuntimeError("Unable to initialize backend 'bogus'"),
      "what JAX_PLATFORMS names",
    ),
    (
      ModuleNotFoundError("x", name="optax.transforms"),
      "pip install 'calm-t5x[train]'",
    ),
    (ModuleNotFoundError("x", name="other"), "install 'other'"),
    (RuntimeError("a bug"), None),
  ],
)
def test_errors_are_one_line_without_effects(capsys, error, words):
  def run(arguments):
    raise error

  if words is None:
    with pytest.raises(RuntimeError, match="a bug"):
      ended(capsys, run)
    return
  code, err = ended(capsys, run)
  assert code == 2 and words in err and err.count("\n") == 1


GIN = {
  "syntax.gin": ("a = 1\nb b\n", r"syntax\.gin, line 2"),
  "unknown.gin": (
    "\nnot_configurable.x = 3\n",
    r"not_configurable.* In file .*unknown\.gin",
  ),
  "self.gin": ("include 'self.gin'\n", "recursion"),
  "module.gin": ("import no_such_module_here\n", "no_such_module_here"),
  "missing.gin": ("include 'nowhere.gin'\n", "nowhere.gin"),
  **{
    binding: ("", "--gin_bindings")
    for binding in ("x", "nobody.knows = 1", "a.b = @c(")
  },
}


@pytest.mark.parametrize("case", GIN)
def test_bad_gin_is_one_line_with_its_place(tmp_path, capsys, case):
  text, words = GIN[case]
  files, bindings = ([case], []) if text else ([], [case])
  (tmp_path / case).write_text(text)
  given = {
    "gin_file": files,
    "gin_bindings": bindings,
    "gin_search_paths": str(tmp_path),
  }
  code, err = ended(capsys, run_lib.parse_gin, **given)
  assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
  assert re.search(words, err), err


def cache_folder():
  import jax

  run_lib.use_compilation_cache()
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
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert cache_folder() == str(tmp_path / "xdg" / "calm" / "xla")
  assert not list(here.iterdir())


def test_a_new_cache_is_its_users_alone_whatever_the_umask(
  cache_in_tmp, tmp_path, monkeypatch
):
  before = os.umask(0)
  try:
    made = pathlib.Path(cache_folder())
  finally:
    os.umask(before)
  for folder in (made, made.parent):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
  ("place", "mode", "refused"),
  [
    ("xdg/calm/xla", 0o775, True),
    ("xdg/calm", 0o777, True),
    ("xdg", 0o777, True),  # anybody may put another `calm` there
    ("xdg", 0o770, True),  # and so may those of its group
    ("xdg", 0o1777, False),  # as /tmp
    ("xdg/calm/xla", 0o755, False),
    ("xdg/calm/xla", 0o700, True),  # of another user
  ],
)
def test_a_cache_that_others_may_write_is_refused(
  place, mode, refused, cache_in_tmp, tmp_path, monkeypatch
):
  cache_folder()
  (tmp_path / place).chmod(mode)
  if mode == 0o700:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
  if not refused:
    assert cache_folder() == str(tmp_path / "xdg" / "calm" / "xla")
    return
  with pytest.raises(
    ValueError, match=rf"Expected '.*{place}' to be .* by you alone"
  ):
    cache_folder()


def test_a_cache_below_a_folder_of_another_user_is_refused(
  cache_in_tmp, tmp_path, monkeypatch
):
  cache_folder()
  theirs = tmp_path / "xdg"
  found = os.stat

  def stat_of(path, **options):
    status = found(path, **options)
    if pathlib.Path(path) != theirs:
      return status
    return os.stat_result([*status[:4], 4321, *status[5:10]])

  monkeypatch.setattr(os, "stat", stat_of)
  with pytest.raises(
    ValueError, match=r"xdg' to be .* by you alone.*user 4321"
  ):
    cache_folder()
