"""The whole way with T5X's own scripts, each in a process of its own, with few
steps.
"""

import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from calm import calibrate, checkpoints, inference
from calm.calibrate import metrics as text_metrics
from calm.calibrate.generations import foreign
from calm.t5 import parameters
from tests.t5x import setup

models = setup.import_models()
pytestmark = setup.ORBAX

REPOSITORY = setup.REPOSITORY
LENGTHS = {"inputs": 32, "targets": 8}
# after a few steps of training, 0.8 may let nothing leave
GRID = (0.8, 0.5, 0.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
  """A folder with a tiny Debian task in it, made of the prompts in the box."""
  folder = tmp_path_factory.mktemp("t5x_runs")
  task = folder / "data" / "debian_synopsis"
  task.mkdir(parents=True)
  lines = (
    (inference.PACKED / "prompts_calibration.jsonl")
    .read_text("utf-8")
    .splitlines()
  )
  rows = [json.loads(line) for line in lines]
  rows = [
    row | {"target": row["targets"], "source": row["group"]} for row in rows
  ]
  cuts = {"train": rows[:32], "validation": rows[32:40], "test": rows[40:52]}
  for split, chosen in cuts.items():
    text = "".join(json.dumps(row) + "\n" for row in chosen)
    (task / f"{split}.jsonl").write_text(text, "utf-8")
  return folder


def command_of(script, *files, **bindings) -> list[str]:
  """One of T5X's scripts, or ours over T5X, as a user starts it."""
  command = [sys.executable, "-W", "ignore", *shlex.split(script)]
  command += ["--gin_search_paths=."] if files else []
  command += [f"--gin_file={file}" for file in files]
  return command + [
    f"--gin.{name}={value!r}" for name, value in bindings.items()
  ]


def run(script, *files, devices=1, **bindings):
  """Runs `command_of` the same; all that it printed."""
  command = command_of(script, *files, **bindings)
  flags = f"--xla_force_host_platform_device_count={devices}"
  env = setup.environment(XLA_FLAGS=flags, JAX_LOG_COMPILES="1")
  done = subprocess.run(
    command, cwd=REPOSITORY, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
  return done.stdout + done.stderr


STAGE_TWO = ("configs/runs/exit_classifier.gin",)
TASK = "configs/tasks/debian_synopsis.gin"
BOX = "configs/runs/t5x_stored_model.gin"


TRAINING = {
  "EVAL_STEPS": 1,
  "EVAL_PERIOD": 2,
  "utils.SaveCheckpointConfig.period": 2,
}
# The same every time, where a user's run takes another order at each start.
TRAINING["train/utils.DatasetConfig.seed"] = 0


def train(work, name, initial, steps, after=(), **more):
  # T5X itself fails at the second checkpoint of a relative folder.
  folder = os.path.relpath(work / name, REPOSITORY)
  given: dict[str, Any] = {"DATA": str(work / "data"), "MODEL_DIR": folder}
  given |= {
    "INITIAL_CHECKPOINT_PATH": str(initial),
    "TASK_FEATURE_LENGTHS": LENGTHS,
  }
  given |= {"TRAIN_STEPS": steps, "BATCH_SIZE": 8, **TRAINING, **more}
  run("-m t5x.train", "configs/runs/local_debian.gin", TASK, *after, **given)
  return work / name / f"checkpoint_{steps}"


@pytest.fixture(scope="module")
def life(work) -> pathlib.Path:
  """The folder that the commands of configs/README.md fill, with few steps and
  short texts.
  """
  page = (REPOSITORY / "configs" / "README.md").read_text("utf-8")
  block = page.split("<!-- life -->")[1].split("```")[1].replace("\\\n", "")
  block = block.replace("runs/", f"{work}/life/")
  block = block.replace(f"configs/{work}/life/", "configs/runs/")
  block = block.replace("'data'", f"'{work}/data'").replace("400", "2")
  short = [f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}", "--gin.BATCH_SIZE=8"]
  for line in block.strip().splitlines():
    first, *words = shlex.split(line)
    more = short * ("--gin_search_paths=." in words)
    if "t5x.train" in words:
      more += [f"--gin.{name}={value}" for name, value in TRAINING.items()]
    if "scripts/t5x_sweep.py" in words:
      more += [f"--gin.THRESHOLDS={GRID}"]
    if first == "calm":
      words, more = (
        ["-m", "calm", *words],
        ["--tolerance=0.95", "--error_rate=0.5"],
      )
    log = run(shlex.join([*words, *more]))
    if "scripts/t5x_sweep.py" in words:
      compiled = log.count("Finished XLA compilation of jit(predict)")
      assert compiled == 1, "a grid compiles once"
  return work / "life"


@pytest.fixture(scope="module")
def trained(work, life):
  """Checkpoints of the model in the box, of stage one and of stage two."""
  one = life / "one" / "checkpoint_2"
  # Three steps: Adafactor clips a scalar's to one learning rate, and two of
  # those can cancel.
  return (
    life / "start" / "checkpoint_0",
    one,
    train(work, "two", one, 5, STAGE_TWO),
  )


def leaves(path):
  return parameters.flatten(checkpoints.load(path).params)


def test_two_stages_train_what_they_should_and_open_without_t5x(trained):
  start, one, two = map(leaves, trained)

  def changed(a, b):
    return {path for path in a if not np.array_equal(a[path], b[path])}

  classifier = {
    "decoder/exit_classifier/kernel",
    "decoder/exit_classifier/bias",
  }
  assert changed(one, two) == classifier
  first = changed(start, one)
  assert len(first - classifier) == len(one) - 2, (
    "stage one trains everything else"
  )


def of_decoding(work, name: str, *after: str, **bindings: Any):
  """(files, bindings) of a run that decodes the test split, by stage one unless
  it is said.
  """
  known = {
    "DATA": work / "data",
    "CHECKPOINT_PATH": work / "life" / "one" / "checkpoint_2",
  }
  bindings = {name: str(path) for name, path in known.items()} | bindings
  bindings |= {
    "TASK_FEATURE_LENGTHS": LENGTHS,
    "utils.DatasetConfig.batch_size": 8,
  }
  return [BOX, f"configs/runs/{name}.gin", TASK, *after], bindings


def infer(work, threshold, devices=1, after=(), **more):
  folder = work / f"infer_{len(after)}_{threshold}_{devices}"
  more |= {} if threshold is None else {"THRESHOLD": threshold}
  files, bindings = of_decoding(
    work, "infer", *after, INFER_OUTPUT_DIR=str(folder), **more
  )
  run("-m t5x.infer", *files, devices=devices, **bindings)
  (file,) = folder.glob("*predict_with_aux.jsonl*-of-00001")
  return file


def test_two_processes_sweep_as_one_and_the_first_writes(work, life):
  """Each holds half of every batch."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  given = {"TASK_PREFIX": "summarize: ", "THRESHOLDS": GRID}
  given["OUTPUT_DIR"] = str(work / "cache_of_two")
  files, bindings = of_decoding(work, "sweep", **given)
  command = command_of("scripts/t5x_sweep.py", *files, **bindings)
  command += [f"--coordinator_address={address}", "--process_count=2"]
  env = setup.environment(XLA_FLAGS="--xla_force_host_platform_device_count=1")
  # Each waits for the other, also where its pipe is full.
  logs = [work / f"log_of_{i}" for i in range(2)]
  started = []
  for i, log in enumerate(logs):
    with log.open("wb") as file:
      words = [*command, f"--process_index={i}"]
      streams = dict(stdout=file, stderr=subprocess.STDOUT)
      started.append(
        subprocess.Popen(words, cwd=REPOSITORY, env=env, **streams)
      )
  codes = [process.wait(timeout=600) for process in started]
  logs = [log.read_text() for log in logs]
  assert codes == [0, 0], logs[0][-4000:] + logs[1][-4000:]
  assert "Written to" in logs[0] and "Written to" not in logs[1]
  one = calibrate.load(life / "cache")
  two = calibrate.load(work / "cache_of_two")
  assert two.procedure == one.procedure and two.prompts == one.prompts
  for a, b in ((one.records[1], two.records[1]), (one.full, two.full)):
    for x, y in zip(a, b, strict=True):
      assert (x.id, x.prediction, x.exit_layers) == (
        y.id,
        y.prediction,
        y.exit_layers,
      )


def test_infer_writes_what_calibrate_reads_and_the_sweep_says_the_same(
  work, life
):
  """On four devices too, a CPU's model axis, where the decoder is restored
  whole.
  """
  files = {t: infer(work, t, n) for t, n in ((None, 1), (GRID[1], 4))}
  cached = calibrate.load(life / "cache")
  got = foreign.gather(files[None], {GRID[1]: files[GRID[1]]})
  assert got.ids == cached.ids and len(got.ids) == 12
  assert [p.targets for p in got.prompts] == [p.targets for p in cached.prompts]
  for a, b in zip(got.records[0], cached.records[1], strict=True):
    assert (a.prediction, a.exit_layers) == (b.prediction, b.exit_layers)
  for a, b in zip(got.full, cached.full, strict=True):
    assert (a.prediction, a.exit_layers) == (b.prediction, b.exit_layers)
    assert set(a.exit_layers) == {8} and a.rejected_confidences is None
  assert got.procedure is None and cached.procedure is not None


def test_the_procedure_is_that_of_calm_infer_and_so_are_the_outputs(life):
  cached = calibrate.load(life / "cache")
  checkpoint = checkpoints.load(life / "one" / "checkpoint_2")
  predictor = inference.Predictor(
    checkpoint.config,
    checkpoint.params,
    checkpoints.load(inference.PACKED).vocabulary,
    inference.options_of(cached.procedure),
  )
  assert predictor.procedure.differences(cached.procedure) == {}
  outputs = predictor.generate(
    [p.input for p in cached.prompts], threshold=GRID[0]
  )
  for output, record in zip(outputs, cached.records[0], strict=True):
    assert (output.text, output.exit_layers) == (
      record.prediction,
      record.exit_layers,
    )
  means = [
    np.mean(np.concatenate([r.exit_layers for r in column]))
    for column in cached.records
  ]
  assert 1 == means[2] <= means[1] <= means[0] <= 8


def test_eval_measures_the_outputs_of_its_threshold(work, life):
  folder = {"EVAL_OUTPUT_DIR": str(work / "eval"), "THRESHOLD": GRID[1]}
  files, bindings = of_decoding(work, "eval", **folder)
  run("-m t5x.eval", *files, **bindings)
  cached = calibrate.load(life / "cache")
  folder = work / "eval" / "inference_eval"
  (metrics,) = (
    (folder / "debian_synopsis-metrics.jsonl").read_text("utf-8").splitlines()
  )
  pairs = list(zip(cached.records[1], cached.prompts, strict=True))
  rouge = text_metrics.get_metric("rouge_l")
  scores = [
    rouge(record.prediction, prompt.targets) for record, prompt in pairs
  ]
  metrics = json.loads(metrics)
  assert metrics["rouge_l"] == pytest.approx(100 * np.mean(scores))
  layers = np.concatenate([record.exit_layers for record, _ in pairs])
  assert metrics["exits/mean_layer"] == pytest.approx(layers.mean())
  for layer, count in zip(*np.unique(layers, return_counts=True), strict=True):
    assert metrics[f"exits/share_layer_{layer}"] == pytest.approx(
      count / len(layers)
    )
  assert metrics["exits/speedup"] > 1.0
  (events,) = (folder / "debian_synopsis").glob("events*")
  assert b"exits/mean_layer" in events.read_bytes()
  (outputs,) = folder.glob("debian_synopsis-0*.jsonl")
  lines = [json.loads(line) for line in outputs.read_text("utf-8").splitlines()]
  assert [line["prediction"] for line in lines] == [
    record.prediction for record, _ in pairs
  ]


def test_exits_beside_frozen_weights_train_infer_and_open_without_t5x(
  work, life
):
  """On two devices, the model axis of T5X's CPU mesh; no other parameter
  moves.
  """
  lines = {"EXIT_LAYERS": (2, 4), "EXIT_RANK": 4}
  after = ["configs/runs/exit_translators.gin"]
  start = life / "start" / "checkpoint_0"
  maps = train(work, "maps", start, 3, after=after, **lines)
  before, stored = map(checkpoints.load, (start, maps))
  assert parameters.base_digest(stored.params) == parameters.base_digest(
    before.params
  )
  assert (
    stored.config.exit_translators == stored.config.exit_propagation == (2, 4)
  )
  ups = [
    part["up"]["kernel"][1:]
    for part in stored.params["decoder"]["exit_propagation"].values()
  ]
  assert all(map(np.any, ups)), "skipped layers' inputs were learned"
  after = ["configs/runs/exit_maps.gin"]
  lines["CHECKPOINT_PATH"] = str(maps)
  file = infer(work, 0.8, devices=2, after=after, **lines)
  prompts, records = foreign.read_predictions(file, 0.8)
  rows = (
    (work / "data" / "debian_synopsis" / "test.jsonl")
    .read_text("utf-8")
    .splitlines()
  )
  texts = {row["id"]: row["input"] for row in map(json.loads, rows)}
  model = work / "maps_model"
  run(f"scripts/from_t5x.py --checkpoint={maps} --output={model}")
  brought = inference.load(model).options
  read = {
    "propagation": brought.propagation,
    "exit_layers": brought.exit_layers,
  }
  assert read == {"propagation": "learned", "exit_layers": (2, 4)}
  lengths = {"max_input_length": 32, "max_decode_length": 8}
  predictor = inference.load(model, measure="softmax", **lengths, **read)
  outputs = predictor.generate(
    [texts[prompt.id] for prompt in prompts], threshold=0.8
  )
  assert len({layer for output in outputs for layer in output.exit_layers}) > 1
  for output, record in zip(outputs, records, strict=True):
    assert (output.text, output.exit_layers) == (
      record.prediction,
      record.exit_layers,
    )


def test_the_page_of_one_life_serves_what_was_certified(life):
  """The sweep's texts at the certified threshold."""
  cached = calibrate.load(life / "cache")
  served = life / "served"
  made = calibrate.Calibration.load(life / "cache" / "calibration.json")
  (file,) = served.glob("*predict_with_aux.jsonl*-of-00001")
  column = cached.records[cached.thresholds.tolist().index(made.threshold)]
  rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
  assert [row["prediction"] for row in rows] == [
    record.prediction for record in column
  ]
  assert len(rows) == 12
