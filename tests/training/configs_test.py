"""Gin files are found beside the package, and inside it once installed."""

import tomllib

import pytest

from calm.training import configs


def test_the_wheel_takes_configs_into_the_package():
  root = configs.root()
  text = (root / "pyproject.toml").read_text("utf-8")
  wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]
  assert wheel["force-include"] == {"configs": f"{configs.PACKAGE.name}/configs"}
  assert (root / "configs" / "runs" / "early_exit.gin").is_file()


def test_installed_they_lie_in_the_package(tmp_path, monkeypatch):
  package = tmp_path / "site-packages" / "calm"
  monkeypatch.setattr(configs, "PACKAGE", package)
  with pytest.raises(FileNotFoundError, match="install the package whole"):
    configs.root()
  (package / "configs" / "runs").mkdir(parents=True)
  assert configs.root() == package
