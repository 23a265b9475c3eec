"""Makes the folder `caches` beside it: cached generations and ledgers as d1de7c0 wrote them.

Run from the root of that commit; later versions must read them:

  PYTHONPATH=. python tests/golden/make_caches.py

  whole         a finished run with groups and references
  shards        two shards of the same list, before they are merged, and `merged`
  outputs       two shards of `calm infer`, and `outputs.jsonl`, merged
  sequential    a run that stopped early, on clusters
  stopped       a run cut off in the middle of a record
  two_writers   a run with a doubled, a torn and a contradicting line
  earlier       as before records named their threshold, and manifests `by_group`
  foreign       outputs of other systems, a file a form
  ledger        calibrations of `cache`, and of a fit by an earlier version
  expected.json what was read from each: digests, losses and calibrations
"""

import hashlib
import json
import pathlib
import shutil

from calm.calibrate import NEVER_EXIT, Procedure, Prompt, Provenance, Record, open_writer
from calm.calibrate.generations import order, shards
from tests.calibrate import golden_caches

HERE = pathlib.Path(__file__).parent / "caches"
GRID = (0.9, 0.5)
LEVELS = (NEVER_EXIT, *GRID)
WORDS = [
  "the",
  "old",
  "house",
  "on",
  "a",
  "hill",
  "was",
  "sold",
  "to",
  "the",
  "couple",
  "north",
]
EARLIER = dict(
  parameters_digest="p" * 64,
  tokenizer_digest="t" * 64,
  task_prefix="summarize: ",
  max_input_length=64,
  max_decode_length=16,
  eos_id=1,
  measure="softmax",
  exit_layers=(2, 4),
  schedule={"name": "decaying", "temperature": 4.0, "max_decode_length": 16},
  propagation="hidden_state",
  shortlist=None,
  heads="shared",
  activation_dtype="float32",
  decode_method={"name": "greedy"},
)
PROCEDURE = Procedure(
  **EARLIER,
  configuration={"emb_dim": 64, "num_layers": 6},
  platform="cpu",
  matmul_precision="default",
)


def prompts(count: int = 60) -> list[Prompt]:
  """Three prompts in ten have a group, three inputs occur twice, and none is ASCII alone."""
  return [
    Prompt(
      f"id-{row}",
      f"input é {row % 57}",
      (f"{' '.join(WORDS[row % 5 : row % 5 + 8])}", f"reference {row}"),
      f"group-{row // 10}" if row % 10 < 3 else None,
    )
    for row in range(count)
  ]


def record(prompt: Prompt, threshold: float) -> Record:
  """Texts that lose more and more words as the threshold falls."""
  row = int(prompt.id.split("-")[1])
  lost = 0 if threshold == NEVER_EXIT or row % 2 else (1 if threshold == 0.9 else 7)
  words = WORDS[row % 5 : row % 5 + 8 - lost]
  layers = [6 if threshold == NEVER_EXIT else 2 + 2 * (place % 2) for place in range(3)]
  return Record(
    prompt.id,
    " ".join(words),
    (row + 5, 7, 1),
    layers,
    (0.5, 0.25, 0.0),
    (0.125, 0.0, 0.5),
    -1.5,
  )


def write(folder, rows, procedure=PROCEDURE, **options):
  writer = open_writer(
    folder,
    prompts=rows,
    thresholds=GRID,
    procedure=procedure,
    provenance=Provenance(metric="rouge_l", notes={"command": "calm generate"}),
    **options,
  )
  for threshold in LEVELS:
    # Batches of like prompts first: no file is in the order of the list.
    for prompt in sorted(rows, key=lambda prompt: prompt.id[::-1]):
      writer.append(threshold, [record(prompt, threshold)])
  writer.finish()


def write_shards():
  names = ["prompts.jsonl", *(f"threshold_{level}.jsonl" for level in ("never", *GRID))]
  for number in range(2):
    listing = shards.Listing(shards.Shard(number, 2))
    mine = list(listing.mine(prompts(20)))
    write(folder := HERE / "shards" / listing.shard.name, mine)
    about = {"procedure": PROCEDURE.to_json(), "thresholds": list(GRID)}
    shards.mark_of("generate", listing, about, folder, names).save(folder)
    (folder := HERE / "outputs" / listing.shard.name).mkdir(parents=True)
    lines = [json.dumps({"id": p.id, "prediction": record(p, 0.5).prediction}) for p in mine]
    (folder / "outputs.jsonl").write_text("\n".join(lines))
    about = {"threshold": 0.5}
    shards.mark_of("infer", listing, about, folder, ["outputs.jsonl"]).save(folder)
  shards.merge([HERE / "shards"], HERE / "merged")
  shards.merge([HERE / "outputs"], HERE / "outputs.jsonl")


def write_sequential():
  rows = prompts(30)
  groups = order.prompt_clusters(rows)
  places = order.decoding_order(
    [row.id for row in rows], groups, PROCEDURE, order.prompts_digest(rows)
  )
  rows = [rows[place] for place in places]
  ends = [n for n in range(1, 30) if groups[places[n]] != groups[places[n - 1]]]
  writer = open_writer(
    HERE / "sequential",
    prompts=rows,
    thresholds=GRID,
    procedure=PROCEDURE,
    sequential=True,
    by_group=True,
  )
  for threshold, count in zip(LEVELS, (ends[-1], ends[-1], ends[-4]), strict=True):
    writer.append(threshold, [record(prompt, threshold) for prompt in rows[:count]])
  writer.finish()


def write_stopped():
  rows = prompts(8)
  for name in ("stopped", "two_writers"):
    writer = open_writer(HERE / name, prompts=rows, thresholds=GRID, procedure=PROCEDURE)
    writer.append(NEVER_EXIT, [record(prompt, NEVER_EXIT) for prompt in rows])
    writer.append(0.9, [record(prompt, 0.9) for prompt in rows[:5]])
    del writer
  path = HERE / "stopped" / "threshold_0.9.jsonl"
  path.write_bytes(path.read_bytes()[:-40])
  path = HERE / "two_writers" / "threshold_0.9.jsonl"
  first, second, third, *rest = path.read_bytes().splitlines(keepends=True)
  other = second.replace(b"the", b"one")
  path.write_bytes(b"".join([first, second, first, third[:30] + b"\n", other, *rest]))


def write_earlier():
  folder = HERE / "earlier"
  write(folder, prompts(40), Procedure(**EARLIER))
  for path in folder.glob("threshold_*.jsonl"):
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in lines:
      del line["threshold"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text("utf-8"))
  del manifest["by_group"]
  manifest["provenance"] = {"metric": "rouge_l", "notes": {"model": "m"}}
  manifest["checksums"] = {
    name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for name in manifest["checksums"]
  }
  path.write_text(json.dumps(manifest, indent=1), "utf-8")


def t5x(prompt: Prompt, threshold: float, aux: bool, **features):
  made = record(prompt, threshold)
  line = {
    "inputs": {"inputs_pretokenized": prompt.input, "targets_pretokenized": prompt.targets[0]},
    "prediction": made.prediction,
  }
  line["inputs"] |= features
  if aux:
    known = {} if threshold == NEVER_EXIT else {"threshold": threshold}
    line["aux"] = {"exit_layers": [*made.exit_layers, 0], "scores": made.score, **known}
    if known:
      line["aux"] |= {name: [0.5, 0.25, 0.0, 0.0] for name in ("confidences",)}
      line["aux"] |= {"rejected_confidences": [0.125, 0.0, 0.5, 0.0]}
    line["prediction_tokens"] = list(made.tokens)
  return line


def chat(prompt, text):
  choices = [{"index": 0, "message": {"role": "assistant", "content": text}}]
  response = {"status_code": 200, "body": {"choices": choices}}
  return {"id": "batch", "custom_id": prompt.id, "response": response, "error": None}


def completion(prompt, text):
  body = {"choices": [{"text": text}]}
  return {"custom_id": prompt.id, "response": {"status_code": 200, "body": body}}


def response(prompt, text):
  parts = [{"type": "output_text", "text": text[:4]}, {"text": text[4:]}]
  body = {"output": [{"type": "reasoning"}, {"type": "message", "content": parts}]}
  return {"custom_id": prompt.id, "response": {"body": body}}


def vllm(prompt, text):
  outputs = [{"index": 0, "text": text}]
  return {"request_id": prompt.id, "prompt": prompt.input, "outputs": outputs}


def plain(prompt, text):
  targets = list(prompt.targets)
  return {"id": prompt.id, "input": prompt.input, "references": targets, "prediction": text}


def write_foreign():
  (folder := HERE / "foreign").mkdir()
  served = {"chat": chat, "completion": completion, "response": response, "vllm": vllm}
  forms = {
    name: lambda prompt, threshold, form=form: form(
      prompt, record(prompt, threshold).prediction
    )
    for name, form in {**served, "plain": plain}.items()
  }
  forms["t5x"] = lambda prompt, threshold: t5x(prompt, threshold, aux=False)
  forms["t5x_aux"] = lambda prompt, threshold: t5x(
    prompt, threshold, aux=True, id=prompt.id, source=f"s {prompt.id}", targets=[5, 6]
  )
  rows = prompts(24)
  for name, form in forms.items():
    for threshold, level in zip(LEVELS, ("never", *GRID), strict=True):
      lines = [form(prompt, threshold) for prompt in rows]
      text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
      (folder / f"{name}_{level}.jsonl").write_text(text, "utf-8")
  lines = [json.dumps(prompt.to_json()) + "\n" for prompt in rows]
  (folder / "prompts.jsonl").write_text("".join(lines))


def write_ledgers():
  from calm.calibrate import ledger

  (folder := HERE / "ledger" / "cache").mkdir(parents=True)
  rows = [f"prompt {row}" for row in range(100)]
  for metric in ("rouge_l", "chrf"):
    ledger.record(
      folder, {"kind": "textual", "metric": metric, "tolerance": 0.1}, rows, 0.05, 0.5
    )
  (folder := HERE / "ledger" / "model" / "fit").mkdir(parents=True)
  digests = sorted(
    hashlib.sha256(f"prompt{row}".encode()).hexdigest()[:16] for row in range(100)
  )
  value = {"when": "2026-11-30T00:00:00+00:00", "kind": "textual", "metric": "token_f1"}
  value |= {"tolerance": 0.2, "error_rate": 0.05, "rows": digests}
  (folder / "certified_rows.json").write_text(json.dumps(value, indent=1))


def main():
  shutil.rmtree(HERE, ignore_errors=True)
  HERE.mkdir()
  write(HERE / "whole", prompts())
  write_shards()
  write_sequential()
  write_stopped()
  write_earlier()
  write_foreign()
  write_ledgers()
  expected = golden_caches.read(HERE)
  text = json.dumps(expected, indent=1, ensure_ascii=False) + "\n"
  (HERE / "expected.json").write_text(text, "utf-8")


if __name__ == "__main__":
  main()
