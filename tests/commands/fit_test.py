"""`calm fit`: mistakes are one message, and the command that it ends with works."""

import json

from tests.commands import toy


def test_mistakes_are_one_message(tmp_path, capsys):
  rows = tmp_path / "rows.jsonl"
  rows.write_text(
    "".join(json.dumps({"input": f"t {i}", "target": "x"}) + "\n" for i in range(9))
  )
  base = ["fit", "--model=nowhere", f"--train={rows}", f"--output={tmp_path / 'out'}"]
  assert "at least 118 rows" in toy.failure(capsys, base)
  assert "`stages`" in toy.failure(capsys, [*base, "--stages=three"])
  assert "`budget`" in toy.failure(capsys, [*base, "--budget=soon"])
  assert "missing.jsonl" in toy.failure(capsys, [*base, "--train=missing.jsonl"])
  assert not (tmp_path / "out").exists()


def test_a_model_folder_without_a_promise_asks_for_one(tmp_path, capsys):
  model = toy.save_model(tmp_path / "model")
  arguments = ["infer", f"--model={model}", "--prompts=-"]
  assert "calm fit" in toy.failure(capsys, arguments)
