"""The script that installs T5X: what of it runs without a network."""

import subprocess

import pytest

from tests.t5x import setup

SCRIPT = setup.REPOSITORY / "scripts" / "install_t5x.sh"


def bash(*arguments, **variables):
  command = ["bash", *map(str, arguments)]
  env = setup.environment(**variables)
  return subprocess.run(command, env=env, capture_output=True, text=True)


def test_it_parses_and_says_how_it_is_used():
  assert bash("-n", SCRIPT).returncode == 0
  done = bash(SCRIPT)
  assert done.returncode == 2 and "FOLDER/env/bin/activate" in done.stderr


@pytest.mark.t5x
def test_it_checks_out_the_tested_commits_and_again_harmlessly(tmp_path):
  pytest.importorskip("t5x.version", reason=setup.REASON)
  sources = setup.t5x_root().parent
  names = ("t5x", "airio", "jestimator", "flaxformer")
  if not all((sources / name / ".git").exists() for name in names):
    pytest.skip("needs clones of T5X and what it imports side by side")
  for _ in range(2):
    done = bash(SCRIPT, tmp_path / "here", "--sources_only", T5X_SOURCES=str(sources))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
      name, _, commit = line.split()
      git = ["git", "-C", str(tmp_path / "here" / "src" / name), "rev-parse", "HEAD"]
      head = subprocess.run(git, capture_output=True, text=True, check=True).stdout
      assert head.startswith(commit)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(names)
