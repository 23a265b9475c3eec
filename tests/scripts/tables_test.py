"""The figures of the READMEs are those of `scripts/results`."""

import json
import re

import pytest

from scripts import tables


def test_every_readme_has_the_tables_of_the_results(capsys):
  assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_result_is_shown_somewhere():
  text = "\n".join(path.read_text("utf-8") for path in tables.readmes())
  shown = {name for _, name, *_ in tables.MARK.findall(text)}
  assert shown == {path.stem for path in tables.RESULTS.glob("*.json")}


def test_commands_of_results_name_no_place_of_one_machine():
  for path in tables.RESULTS.glob("*.json"):
    command = json.loads(path.read_text("utf-8"))["command"]
    assert not re.search(r"(?:^|[\s='\"])/", command), (path.name, command)


def typed(text):
  """Rows of tables outside the marks that show measured figures: two decimals
  or a ratio.
  """
  rows = [
    line
    for line in tables.MARK.sub("", text).splitlines()
    if line.startswith("|")
  ]
  return [row for row in rows if re.search(r"\|\s*x?\d+\.\d\d\b", row)]


def test_no_measured_figure_is_typed_into_a_table():
  for path in tables.readmes():
    assert not typed(path.read_text("utf-8")), path
  # The check can fail.
  assert typed("| full depth | 7.61 |\n") and typed("| a | x1.54 |\n")


def test_a_table_is_made_of_lists_or_objects():
  result = {
    "command": "python x.py",
    "columns": ["system", "ms"],
    "rows": [["full | depth", 7.614], {"ms": 123.456, "system": None}],
    "versions": {"jax": "0.10.2"},
  }
  lines = tables.table(result).splitlines()
  assert lines[2:4] == ["| full \\| depth | 7.61 |", "|  | 123 |"]
  assert lines[-1] == "<sub>jax 0.10.2. `python x.py`</sub>"


def test_a_changed_figure_is_found(tmp_path, monkeypatch, capsys):
  folder = tmp_path / "results"
  folder.mkdir()
  (folder / "a.json").write_text(
    '{"command": "c", "columns": ["x"], "rows": [[2.0]], "versions": {}}'
  )
  readme = tmp_path / "README.md"
  readme.write_text("<!-- table: a -->\n| x |\n|---|\n| 1.00 |\n<!-- end -->\n")
  monkeypatch.setattr(tables, "RESULTS", folder)
  monkeypatch.setattr(tables, "ROOT", tmp_path)
  assert (
    tables.main(["--check"]) == 1 and "README.md" in capsys.readouterr().out
  )
  assert tables.main([]) == 0 and "2.00" in readme.read_text()
  assert tables.main(["--check"]) == 0
  with pytest.raises(FileNotFoundError):
    tables.rendered("<!-- table: missing -->\n<!-- end -->")
