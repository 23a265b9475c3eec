"""Gin files are found beside the package, and inside it once installed."""

import tomllib

from calm.training import configs


def test_the_wheel_takes_configs_into_the_package():
  root = configs.root()
  text = (root / "pyproject.toml").read_text("utf-8")
  wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]
  assert wheel["force-include"] == {"configs": f"{configs.PACKAGE.name}/configs"}
  assert (root / "configs" / "runs" / "early_exit.gin").is_file()
