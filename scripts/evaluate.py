"""Scores a model's full-depth outputs (or a static depth's) against references.

python scripts/evaluate.py --prompts=test.jsonl.gz --metrics rouge_l
python scripts/evaluate.py --model=my_model --prompts=dev.jsonl --metrics
token_f1 exact_match
"""

import argparse
import statistics

from calm import exits, inference
from calm.calibrate import metrics
from calm.commands import flags
from calm.commands import run as run_lib


def main() -> None:
  parser = argparse.ArgumentParser(
    description="Scores outputs against references."
  )
  flags.add_model(parser)
  parser.add_argument(
    "--layers", type=int, help="static depth (default: all decoder layers)"
  )
  parser.add_argument(
    "--metrics", nargs="+", default=["rouge_l"], help="names or import paths"
  )
  arguments = parser.parse_args()
  run_lib.use_compilation_cache()
  model = inference.load(arguments.model, **flags.decode_options(arguments))
  prompts = list(flags.open_prompts(arguments))
  texts = [prompt.input for prompt in prompts]
  outputs = model.generate(texts, rule=exits.StaticExit(arguments.layers))
  for name in arguments.metrics:
    metric = metrics.get_metric(name)
    scores = [
      metric(o.text, p.targets) for o, p in zip(outputs, prompts, strict=True)
    ]
    print(
      f"{name}: {100 * statistics.fmean(scores):.2f} on {len(prompts)} prompts"
    )


if __name__ == "__main__":
  main()
