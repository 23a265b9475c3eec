"""A small folder of cached generations, and an online state's options; made
without JAX.
"""

import pathlib

from calm.calibrate import NEVER_EXIT, generations
from calm.calibrate.generations import records
from tests.calibrate import laws

ONLINE = dict(
  thresholds=[0.9, 0.5], tolerance=0.2, seed="s", about={"metric": "f1"}
)


def write(folder: pathlib.Path, prompts=(), procedure=None) -> pathlib.Path:
  """Full depth and one threshold, of three prompts or those given."""
  prompts = prompts or laws.prompts(3)
  made = generations.open_writer(
    folder, prompts=prompts, thresholds=[0.5], procedure=procedure
  )
  for threshold in (NEVER_EXIT, 0.5):
    made.append(threshold, [record(prompt.id) for prompt in prompts])
  made.finish()
  return folder


def record(name: str) -> records.Record:
  numbers = dict(tokens=(5, 1), exit_layers=(1, 2), confidences=(0.5, 0.25))
  return records.Record(
    name, "text", **numbers, rejected_confidences=(0.0, 0.1), score=-1.0
  )
