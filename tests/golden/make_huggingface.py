"""Makes the folder `huggingface/`: tiny models of each kind with transformers' own outputs.

Needs torch and transformers; the tests that read the folder need neither. Run from the
repository root:

  python tests/golden/make_huggingface.py

One subfolder a kind, named as in KINDS: `config.json` in the style of the published model,
`model.safetensors` (or shards and their index), and `expected.npz` with
  input_ids [3, 9], attention_mask, decoder_input_ids [3, 6]
  encoded [3, 9, d_model], logits [3, 6, vocab] float32
computed by transformers after `from_pretrained` of that very folder. Rows are padded to
lengths 9, 5 and 1. `make` is also used by the live test.
"""

import json
import logging
import pathlib

import numpy as np
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = dict(vocab_size=48, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2)
# What published configurations of T5 1.1 and its kin have in common.
GATED = dict(feed_forward_proj="gated-gelu", num_decoder_layers=2, tie_word_embeddings=False)
# Kind -> published-style configuration, and whether the file holds a head of its own.
KINDS = {
  # google-t5/t5-small: ReLU, tied and scaled by default, no decoder depth of its own.
  "t5_1_0": (dict(model_type="t5", **SIZES), False),
  "t5_1_1": (dict(model_type="t5", **SIZES, **GATED), True),
  # Stored as two shards in bfloat16.
  "flan_t5": (dict(model_type="t5", **SIZES, **GATED), True),
  "mt5": (dict(model_type="mt5", **(SIZES | dict(vocab_size=80)), **GATED), True),
  # More encoder than decoder layers, 384 rows.
  "byt5": (
    dict(
      model_type="t5",
      **(SIZES | dict(vocab_size=384, d_model=12, num_layers=3)),
      **(GATED | dict(num_decoder_layers=1)),
    ),
    True,
  ),
  # As transformers 5 saves a T5 1.1 that it made: tied, and yet not scaled.
  "t5_1_1_resaved": (
    dict(
      model_type="t5",
      **SIZES,
      **(GATED | dict(tie_word_embeddings=True)),
      scale_decoder_outputs=False,
    ),
    False,
  ),
}


def draw_weights(shapes: dict, rng: np.random.RandomState) -> dict[str, torch.Tensor]:
  """Weights on the scale of a trained T5; norm scales are not 1."""
  weights = {}
  for name, shape in sorted(shapes.items()):
    values = rng.standard_normal(shape)
    if name.endswith("layer_norm.weight"):
      values = 1 + 0.3 * values
    elif "relative_attention_bias" not in name and name != "shared.weight":
      values = values / np.sqrt(shape[-1])
    weights[name] = torch.tensor(values, dtype=torch.float32)
  return weights


def save_weights(kind: str, weights: dict, directory: pathlib.Path) -> None:
  if kind != "flan_t5":
    path = directory / "model.safetensors"
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return
  weight_map = {}
  for shard in (1, 2):
    name = f"model-{shard:05d}-of-00002.safetensors"
    part = {n: w.bfloat16() for i, (n, w) in enumerate(weights.items()) if i % 2 == shard - 1}
    safetensors.torch.save_file(part, directory / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def batch(config: dict, rng: np.random.RandomState) -> dict[str, np.ndarray]:
  input_ids, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
  for row, length in enumerate((9, 5, 1)):
    input_ids[row, :length] = rng.randint(3, config["vocab_size"], length)
    mask[row, :length] = 1
  decoder_input_ids = rng.randint(3, config["vocab_size"], (3, 6))
  decoder_input_ids[:, 0] = 0
  return dict(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids)


def run(directory: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Encoder states and logits of transformers, in float32, for the model in `directory`."""
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    output = model(**{name: torch.tensor(array) for name, array in inputs.items()})
  return dict(
    encoded=output.encoder_last_hidden_state.numpy(),
    logits=output.logits.numpy().astype(np.float32),
  )


def make(kind: str, directory: pathlib.Path, seed: int = 0) -> None:
  """Writes one kind's folder."""
  config, own_head = KINDS[kind]
  rng = np.random.RandomState(seed)
  directory.mkdir(parents=True, exist_ok=True)
  published = dict(
    **config,
    architectures=[f"{config['model_type'].upper()}ForConditionalGeneration"],
    is_encoder_decoder=True,
    layer_norm_epsilon=1e-06,
    decoder_start_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
    relative_attention_num_buckets=32,
  )
  (directory / "config.json").write_text(json.dumps(published, indent=1) + "\n")
  made = transformers.AutoModelForSeq2SeqLM.from_config(
    transformers.AutoConfig.from_pretrained(directory)
  )
  shapes = {name: tuple(weight.shape) for name, weight in made.named_parameters()}
  if own_head:
    shapes["lm_head.weight"] = shapes["shared.weight"]
  save_weights(kind, draw_weights(shapes, rng), directory)
  inputs = batch(config, rng)
  np.savez_compressed(directory / "expected.npz", **inputs, **run(directory, inputs))


def main() -> None:
  logging.getLogger("transformers").setLevel(logging.ERROR)
  for seed, kind in enumerate(KINDS):
    make(kind, HERE / "huggingface" / kind, seed)


if __name__ == "__main__":
  main()
