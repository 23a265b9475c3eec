"""Makes the folder `huggingface/`: tiny models of each kind with transformers'
own outputs.

Needs torch and transformers; the tests that read the folder need neither. Run
from the repository root:

  python tests/golden/make_huggingface.py

One subfolder a kind, named as in KINDS: `config.json` in the style of the
published model (or, where SAVED says so, as transformers 5 saves it today, with
`generation_config.json`), `model.safetensors` (or shards and their index),
`tokenizer.json` where TOKENIZERS has the kind, and `expected.npz` with
input_ids [3, 9], attention_mask, decoder_input_ids [3, 6] encoded [3, 9,
d_model], logits [3, 6, vocab] float32
computed by transformers after `from_pretrained` of that very folder. Rows are
padded to lengths 9, 5 and 1. Beside a tokenizer, `expected.json` has texts with
the ids that transformers makes of them, and the text of those ids. `make` is
also used by the live test.
"""

import json
import logging
import pathlib

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = dict(
  vocab_size=48, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2
)
# What published configurations of T5 1.1 and its kin have in common.
GATED = dict(
  feed_forward_proj="gated-gelu",
  num_decoder_layers=2,
  tie_word_embeddings=False,
)


def published(
  own_head: bool = True, gated: bool = True, **changes
) -> tuple[dict, bool]:
  """A published-style configuration, and whether the file holds a head of its
  own.
  """
  return dict(
    model_type="t5", **SIZES, **(GATED if gated else {})
  ) | changes, own_head


KINDS = {
  # google-t5/t5-small: ReLU, tied and scaled by default, no decoder depth of
  # its own.
  "t5_1_0": published(False, gated=False),
  "t5_1_1": published(),
  # Stored as two shards in bfloat16.
  "flan_t5": published(),
  "mt5": published(model_type="mt5", vocab_size=80),
  # More encoder than decoder layers, 384 rows.
  "byt5": published(
    vocab_size=384, d_model=12, num_layers=3, num_decoder_layers=1
  ),
  # As transformers 5 saves a T5 1.1 that it made: tied, and yet not scaled.
  "t5_1_1_resaved": published(
    False, tie_word_embeddings=True, scale_decoder_outputs=False
  ),
  # google/t5-v1_1-*-lm-adapt: T5 1.1, saved by transformers 5 in half precision
  # and in shards.
  "t5_lm_adapt": published(),
  # google/madlad400: 0 is <unk> and starts, 1 is padding, 2 ends.
  "madlad": published(pad_token_id=1, eos_token_id=2),
  # google/umt5: a relative bias in every layer.
  "umt5": published(model_type="umt5", vocab_size=80),
  # EleutherAI/pile-t5: umT5's code, Llama's tokenizer.
  "pile_t5": published(model_type="umt5", vocab_size=320, eos_token_id=2),
  # Salesforce/codet5: T5 1.0 with RoBERTa's tokenizer, which begins a text with
  # a token, too.
  "codet5": published(False, gated=False, vocab_size=320, eos_token_id=2),
}

# Kinds that are saved by transformers as they are, and in which precision.
SAVED = dict(
  t5_lm_adapt="float16", umt5="bfloat16", pile_t5="bfloat16", codet5="float16"
)
TEXTS = [
  "the cat sat on the mat, then the cat ran",
  "a cat is not the mat that it sat on",
  "caf\u00e9 \u732b <extra_id_0> \U0001f600",
  "  spaces   and\nlines ",
  "",
]


def draw_weights(
  shapes: dict, rng: np.random.RandomState
) -> dict[str, torch.Tensor]:
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
  if kind in SAVED:
    return
  if kind != "flan_t5":
    path = directory / "model.safetensors"
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return
  weight_map = {}
  for shard in (1, 2):
    name = f"model-{shard:05d}-of-00002.safetensors"
    part = {
      n: w.bfloat16()
      for i, (n, w) in enumerate(weights.items())
      if i % 2 == shard - 1
    }
    safetensors.torch.save_file(
      part, directory / name, metadata={"format": "pt"}
    )
    weight_map |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(
    json.dumps(index, indent=1) + "\n"
  )


def batch(config: dict, rng: np.random.RandomState) -> dict[str, np.ndarray]:
  pad = config.get("pad_token_id", 0)
  input_ids = np.full((3, 9), pad, np.int64)
  mask = np.zeros((3, 9), np.int64)
  for row, length in enumerate((9, 5, 1)):
    input_ids[row, :length] = rng.randint(3, config["vocab_size"], length)
    mask[row, :length] = 1
  if pad:  # another token has the id 0, and counts
    input_ids[:2, 1] = 0
  decoder_input_ids = rng.randint(3, config["vocab_size"], (3, 6))
  decoder_input_ids[:, 0] = 0
  return dict(
    input_ids=input_ids,
    attention_mask=mask,
    decoder_input_ids=decoder_input_ids,
  )


def run(
  directory: pathlib.Path, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Encoder states and logits of transformers, in float32, for the model in
  `directory`.
  """
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    output = model(
      **{name: torch.tensor(array) for name, array in inputs.items()}
    )
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
    architectures=[f"{config['model_type'].upper()}ForConditionalGeneration"],
    is_encoder_decoder=True,
    layer_norm_epsilon=1e-06,
    decoder_start_token_id=0,
    relative_attention_num_buckets=32,
    **{"eos_token_id": 1, "pad_token_id": 0, **config},
  )
  (directory / "config.json").write_text(json.dumps(published, indent=1) + "\n")
  made = transformers.AutoModelForSeq2SeqLM.from_config(
    transformers.AutoConfig.from_pretrained(directory)
  )
  shapes = {
    name: tuple(weight.shape) for name, weight in made.named_parameters()
  }
  if own_head:
    shapes["lm_head.weight"] = shapes["shared.weight"]
  weights = draw_weights(shapes, rng)
  save_weights(kind, weights, directory)
  if kind in SAVED:
    made.load_state_dict(weights, strict=False)
    if own_head:
      made.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    made.to(getattr(torch, SAVED[kind])).save_pretrained(
      directory, max_shard_size="12KB"
    )
  if kind in TOKENIZERS:
    save_tokenizer(kind, directory)
  inputs = batch(config, rng)
  np.savez_compressed(
    directory / "expected.npz", **inputs, **run(directory, inputs)
  )


def byte_level_tokenizer() -> tokenizers.Tokenizer:
  """RoBERTa's: bytes, merges, `<s>` before and `</s>` after."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<mask>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(TEXTS, trainer)
  made.post_processor = tokenizers.processors.RobertaProcessing(
    ("</s>", 2), ("<s>", 1)
  )
  made.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(4))])
  return made


def llama_tokenizer() -> tokenizers.Tokenizer:
  """Llama's: BPE with bytes for what has no piece, spaces as marks; `</s>`
  after.
  """
  normalizers = tokenizers.normalizers
  decoders = tokenizers.decoders
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  letters = sorted(
    {c for text in TEXTS[:2] for c in text.replace(" ", "\u2581")}
  )
  vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters])}
  vocabulary["\u2581t"] = len(vocabulary)
  model = tokenizers.models.BPE(
    vocab=vocabulary,
    merges=[("\u2581", "t")],
    unk_token="<unk>",
    byte_fallback=True,
  )
  made = tokenizers.Tokenizer(model)
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 2)]
  )
  return made


def unigram_tokenizer() -> tokenizers.Tokenizer:
  """T5's own as transformers 5 saves it, without a `spiece.model`."""
  made = tokenizers.Tokenizer(tokenizers.models.Unigram())
  made.normalizer = tokenizers.normalizers.NFKC()
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.UnigramTrainer(
    vocab_size=40,
    special_tokens=["<pad>", "</s>", "<unk>"],
    unk_token="<unk>",
    show_progress=False,
  )
  made.train_from_iterator(TEXTS[:2], trainer)
  made.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(4))])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  return made


TOKENIZERS = {
  "codet5": byte_level_tokenizer,
  "pile_t5": llama_tokenizer,
  "t5_lm_adapt": unigram_tokenizer,
}


def save_tokenizer(kind: str, directory: pathlib.Path) -> None:
  """tokenizer.json as transformers saves it, and what it makes of the texts."""
  made = transformers.PreTrainedTokenizerFast(
    tokenizer_object=TOKENIZERS[kind](),
    pad_token=None if kind == "pile_t5" else "<pad>",
    eos_token="</s>",
    unk_token="<unk>",
  )
  made.save_pretrained(directory)
  rows = [{"text": text, "ids": made(text)["input_ids"]} for text in TEXTS]
  for row in rows:
    row["decoded"] = made.decode(row["ids"], skip_special_tokens=True)
  text = (
    "[\n"
    + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    + "\n]\n"
  )
  (directory / "expected.json").write_text(text, encoding="utf-8")


def main() -> None:
  logging.getLogger("transformers").setLevel(logging.ERROR)
  for seed, kind in enumerate(KINDS):
    make(kind, HERE / "huggingface" / kind, seed)


if __name__ == "__main__":
  main()
