r"""`calm infer` over Ray Data: one model an actor, prompts in, outputs in their order.

  pip install "ray[data]"           # no dependence of calm; needed here alone (run with 2.60.0)
  python scripts/ray_infer.py --prompts=prompts.jsonl --calibration=calibration.json \
    --output=outputs.jsonl --actors=4

Every actor is a process with the model in it, under the calibration's promise; Ray moves rows
to actors and back, and starts again what fails. Actors exchange nothing: a prompt's tokens and
exits do not depend on the actor, nor (in float32) on the rows beside it. Blocks of rows go to
whichever actor is free; what comes back is sorted by the place of its prompt.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
from ray import data as ray_data  # pyright: ignore[reportMissingImports]

from calm import storage
from calm.data import prompt_files


class Decoder:
  """An actor: the model, opened once."""

  def __init__(self, model: str, calibration: str | None, threshold: float | None):
    from calm import inference

    self._model = inference.load(model, calibration=calibration)
    self._threshold = threshold

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of {place, id, input} -> rows of {place, line}."""
    texts = [str(text) for text in batch["input"]]
    outputs = self._model.generate(texts, threshold=self._threshold)
    lines = [
      json.dumps(
        {
          "id": str(name),
          "prediction": output.text,
          "tokens": list(output.tokens),
          "exit_layers": list(output.exit_layers),
        },
        ensure_ascii=False,
      )
      for name, output in zip(batch["id"], outputs, strict=True)
    ]
    return {"place": batch["place"], "line": np.array(lines, object)}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", default="packed")
  parser.add_argument("--prompts", required=True)
  parser.add_argument("--calibration", help="the promise that is served under")
  parser.add_argument("--threshold", type=float, help="a number in [0, 1]; without a promise")
  parser.add_argument("--output", required=True)
  parser.add_argument("--actors", type=int, default=2)
  parser.add_argument("--batch_size", type=int, default=8, help="rows that an actor is given")
  flags = parser.parse_args()
  prompts = prompt_files.open_prompts(flags.prompts)
  rows = [
    {"place": place, "id": prompt.id, "input": prompt.input}
    for place, prompt in enumerate(prompts)
  ]
  ray.init(num_cpus=flags.actors, include_dashboard=False, log_to_driver=False)
  calibration = flags.calibration and str(pathlib.Path(flags.calibration).resolve())
  decoded = ray_data.from_items(rows, override_num_blocks=4 * flags.actors).map_batches(
    Decoder,
    fn_constructor_args=(flags.model, calibration, flags.threshold),
    batch_size=flags.batch_size,
    concurrency=flags.actors,
    num_cpus=1,
  )
  lines = {int(row["place"]): row["line"] for row in decoded.iter_rows()}
  if set(lines) != set(range(len(rows))):
    raise RuntimeError(
      f"Expected outputs of {len(rows)} prompts, got {len(lines)}; run it again."
    )
  text = "".join(f"{lines[place]}\n" for place in range(len(rows)))
  storage.write_atomically(flags.output, text)
  print(f"{len(lines)} prompts by {flags.actors} actors: {flags.output}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
