"""Caches and ledgers that earlier versions wrote are read as they were then, bit for bit."""

import json
import pathlib
import re
import shutil
import tempfile

import pytest

from calm.calibrate import calibrate, generations, ledger, open_writer
from calm.calibrate import losses as sequence_losses
from calm.calibrate.generations import foreign
from calm.commands import merge

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "caches"
EXPECTED = json.loads((FOLDER / "expected.json").read_text("utf-8"))
KINDS = {"textual": "rouge_l", "risk_signed": "token_f1", "risk_clipped": "chrf"}
RATES = {"tolerance": 0.3, "error_rate": 0.1, "randomized": False}
FORMS = ("plain", "chat", "completion", "response", "vllm", "t5x", "t5x_aux")


def read(root: pathlib.Path) -> dict:
  """What each cache says."""
  with tempfile.TemporaryDirectory() as place:
    # Runs are gone on with, and ledgers written to: in a copy.
    copy = pathlib.Path(place) / "caches"
    shutil.copytree(root, copy)
    found = {name: of_generations(generations.load(copy / name)) for name in FOLDERS}
    found["sequential"] = of_sequential(copy / "sequential")
    found |= {f"foreign {form}": of_foreign(copy / "foreign", form) for form in FORMS}
    found |= {name: of_stopped(copy / name) for name in ("stopped", "two_writers")}
    found["merging"] = of_merging(copy)
    found["ledger"] = of_ledger(copy / "ledger")
  return json.loads(json.dumps(found).replace(place, ""))


FOLDERS = ("whole", "merged", "earlier")


def of_generations(made) -> dict:
  counts = made.layer_counts()
  return {
    "procedure": None if made.procedure is None else made.procedure.digest(),
    "provenance": made.provenance.to_json(),
    "ids": made.ids,
    "groups": [prompt.group for prompt in made.prompts],
    "references": [prompt.targets for prompt in made.prompts],
    "knobs": made.knobs,
    "layers": None if counts is None else [count.sum(axis=0).tolist() for count in counts],
    "records": [record.to_json() for record in (made.full[3], made.records[-1][0])],
    "losses": {
      kind: of_losses(made, kind)
      for kind in KINDS
      if kind == "textual" or any(prompt.targets for prompt in made.prompts)
    },
  }


def of_losses(made, kind: str) -> dict:
  losses = sequence_losses.compute(made, kind, metric=KINDS[kind])
  return {
    "values": [[value.hex() for value in row] for row in losses.values.tolist()],
    "contents": losses.contents,
    "groups": losses.groups,
    "calibration": calibrate(losses, **RATES).to_json(),
  }


def of_sequential(folder: pathlib.Path) -> dict:
  made, manifest = generations.load(folder), generations.read_manifest(folder)
  prefixes = sequence_losses.prefix_losses(made, "textual")
  return {
    "ids": made.ids,
    "flags": [manifest["sequential"], manifest["by_group"]],
    "losses": [[value.hex() for value in column.tolist()] for column in prefixes],
  }


def of_foreign(folder: pathlib.Path, form: str) -> dict:
  files = {level: folder / f"{form}_{level}.jsonl" for level in (0.9, 0.5)}
  prompts = None if form in ("plain", "t5x", "t5x_aux", "vllm") else folder / "prompts.jsonl"
  full = folder / f"{form}_never.jsonl"
  found = of_generations(foreign.gather(full, files, prompts=prompts))
  knobs = foreign.gather(full, {f"at {k}": v for k, v in files.items()}, prompts=prompts)
  return found | {"knob": calibrate(sequence_losses.compute(knobs, "textual"), **RATES).knob}


def of_stopped(folder: pathlib.Path) -> dict:
  """What resuming finds and repairs, and which references are asked for."""
  manifest = generations.read_manifest(folder)
  procedure = generations.manifest_procedure(manifest)
  rows = generations.records.read_prompts(folder / "prompts.jsonl")
  writer = open_writer(
    folder, prompts=rows, thresholds=manifest["thresholds"], procedure=procedure
  )
  return {
    "reports": numbers(*writer.reports),
    "done": {
      str(level): sorted(writer.completed_ids(level)) for level in (float("inf"), 0.9, 0.5)
    },
    "records": [
      r.to_json() for r in writer.completed_records(0.9, [row.id for row in rows]).values()
    ],
  }


def of_merging(copy: pathlib.Path) -> dict:
  """Shards merged again are the merged folder, but for two fields of earlier versions."""
  counts = [
    merge.merge([copy / "shards"], copy / "again"),
    merge.merge([copy / "outputs"], copy / "again.jsonl"),
  ]
  old = re.compile(rb' "(sequential|by_group)": false,\n')
  content = lambda path: old.sub(b"", path.read_bytes())
  merged = (copy / "merged").iterdir()
  same = all(content(copy / "again" / path.name) == content(path) for path in merged)
  outputs = (copy / "again.jsonl").read_bytes() == (copy / "outputs.jsonl").read_bytes()
  return {"counts": counts, "same": [same, outputs]}


def of_ledger(folder: pathlib.Path) -> list:
  question = {"kind": "risk_signed", "metric": "token_f1", "tolerance": 0.2}
  rows = [f"Prompt {row}!" for row in range(100)]
  return [
    numbers(ledger.record(folder / "cache", question, rows, 0.05)),
    numbers(ledger.record(folder / "model", question, rows[:40], 0.05, only_look=True)),
    len(generations.records.read_prompts(folder.parent / "foreign" / "prompts.jsonl")),
  ]


def numbers(*sentences: str) -> list[list[str]]:
  """The numbers in sentences, whose words may change."""
  return [re.findall(r"\d[\d.]*", re.sub(r"/\S+", "", sentence)) for sentence in sentences]


@pytest.fixture(scope="module")
def found():
  return read(FOLDER)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_was_written_before_is_read_as_before(found, name):
  assert found[name] == EXPECTED[name]


def test_the_golden_caches_are_all_looked_at(found):
  assert set(found) == set(EXPECTED) and found["merging"]["same"] == [True, True]
