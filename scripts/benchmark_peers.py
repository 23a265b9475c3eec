"""Other people's decoders on the same weights, for `benchmark.py`; what is not there is named.

T5X and flaxformer take our parameter tree as it is; transformers reads the checkpoint that
`huggingface.write` makes, and CTranslate2 converts that one.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import benchmark_models as models
import jax
import jax.numpy as jnp
import numpy as np
from benchmark_systems import Decoded, System

from calm.checkpoints import huggingface

START = 0  # what every decoder reads first


def imported(name: str) -> Any:
  """A package that may not be there when this file is checked."""
  return importlib.import_module(name)


def not_installed(*packages: str) -> str | None:
  """The first package that cannot be imported and why, or None."""
  for package in packages:
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(package)
    except Exception as error:  # a broken installation is as good as none, and says why
      return f"{package}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
  return None


@dataclasses.dataclass(frozen=True)
class Peer:
  """Somebody else's decoder.

  Attributes:
    name: as in the table.
    packages: what must be importable.
    systems: (model, setting, depths) -> its rows.
  """

  name: str
  packages: tuple[str, ...]
  systems: Callable[[models.Model, models.Setting, Sequence[int]], list[System]]


def _t5x_params(model: models.Model) -> dict[str, Any]:
  decoder = {k: v for k, v in model.params["decoder"].items() if not k.startswith("exit_")}
  return jax.tree.map(jnp.asarray, {**model.params, "decoder": decoder})


def _t5x_network(model: models.Model) -> Any:
  network = imported("t5x.examples.t5.network")
  config = model.config
  names = [name for name in network.T5Config.__dataclass_fields__ if name != "dtype"]
  given = {name: getattr(config, name) for name in names}
  return network.Transformer(network.T5Config(dtype=jnp.dtype(config.dtype), **given))


def _vocabulary(model: models.Model) -> Any:
  return imported("seqio").PassThroughVocabulary(model.config.vocab_size, max(model.eos_id, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class T5xLoop:
  """T5X's `temperature_sample`, greedy, around a model's "tokens to logits".

  Attributes:
    model: whose weights they are.
    setting: lengths and prompts.
    module: T5X's or flaxformer's network.
    to_logits: of the T5X model, with encoded_inputs, raw_inputs and max_decode_length left.
    sample: the loop.
  """

  model: models.Model
  setting: models.Setting
  module: Any
  to_logits: Callable[..., Any]
  sample: Callable[..., Any]

  def system(self, name: str, depth: float | None) -> System:
    params = _t5x_params(self.model)
    tokens = [jnp.asarray(batch) for batch in models.batches(self.model, self.setting)]
    apply = functools.partial(self.module.apply, enable_dropout=False)
    encode = jax.jit(lambda params, t: apply({"params": params}, t, method=self.module.encode))
    decode = jax.jit(self._decode)

    def encode_all():
      return jax.block_until_ready([encode(params, t) for t in tokens])

    encoded = encode_all()

    def run() -> Decoded:
      made = [decode(params, e, t) for e, t in zip(encoded, tokens, strict=True)]
      return Decoded([np.asarray(sequences)[:, -1] for sequences in made])

    return System(name, run, encode_all, measured_layers=depth, peer=True)

  def _decode(self, params, encoded, tokens):
    shape = (tokens.shape[0], self.setting.decode_length)
    ones = jnp.ones(shape, jnp.int32)
    _, variables = self.module.apply(
      {"params": params},
      jnp.ones_like(tokens),
      ones,
      ones,
      decode=True,
      enable_dropout=False,
      mutable=["cache"],
    )
    to_logits = functools.partial(
      self.to_logits,
      params=params,
      encoded_inputs=encoded,
      raw_inputs=tokens,
      max_decode_length=shape[1],
    )
    sequences, _ = self.sample(
      inputs=jnp.zeros(shape, jnp.int32),
      cache=variables["cache"],
      tokens_to_logits=to_logits,
      eos_id=self.model.eos_id,
      num_decodes=1,
    )
    return sequences


def t5x_systems(model, setting, depths) -> list[System]:
  """T5X's own network in T5X's own loop; a static k is the network of k layers."""
  del depths
  decoding, t5x_models = imported("t5x.decoding"), imported("t5x.models")
  words, module = _vocabulary(model), _t5x_network(model)
  theirs = t5x_models.EncoderDecoderModel(module, words, words, optimizer_def=None)
  loop = T5xLoop(
    model, setting, module, theirs._compute_logits_from_slice, decoding.temperature_sample
  )
  return [loop.system("T5X temperature_sample, full depth", model.config.num_decoder_layers)]


# Their names of the measures, the paper's own first; theirs compares one row only for 'state'.
CALM_METHODS = ("softmax_diff_approx", "softmax_max", "state")


def t5x_calm_systems(model, setting, depths) -> list[System]:
  """t5x/contrib/calm over flaxformer: exits forced by `min_exit`, threshold 0."""
  decoding = imported("t5x.contrib.calm.decoding")
  calm_models = imported("t5x.contrib.calm.models")
  words, module, made = _vocabulary(model), _flaxformer(model), []
  num_layers = model.config.num_decoder_layers
  methods = [m for m in CALM_METHODS if m != "state" or setting.batch_size == 1]
  for method in methods:
    for depth in [*(d for d in depths if d < num_layers), num_layers]:
      theirs = calm_models.EncoderDecoderModel(
        module,
        words,
        words,
        optimizer_def=None,
        apply_early_inference=True,
        decoder_layers=num_layers,
        conf_method=method,
        conf_threshold=0.0,
        min_exit=depth,
      )
      to_logits = lambda state, t=theirs, **given: t._compute_logits_from_slice_early_exit(
        state, conf_threshold=0.0, **given
      )
      loop = T5xLoop(model, setting, module, to_logits, decoding.temperature_sample)
      made.append(loop.system(f"t5x/contrib/calm {method}, forced {depth}", depth))
  return made


def _flaxformer(model: models.Model) -> Any:
  """Their CALM network of the model's sizes, from their own gin files."""
  flaxformer, gin = imported("flaxformer"), imported("gin")
  root = pathlib.Path(flaxformer.__file__).parents[1]
  config = model.config
  bindings = {
    "NUM_ENCODER_LAYERS": config.num_encoder_layers,
    "NUM_DECODER_LAYERS": config.num_decoder_layers,
    "NUM_HEADS": config.num_heads,
    "HEAD_DIM": config.head_dim,
    "EMBED_DIM": config.emb_dim,
    "MLP_DIM": config.mlp_dim,
    "NUM_EMBEDDINGS": config.vocab_size,
    "ACTIVATION_DTYPE": config.dtype,
    "RETURN_ALL_LOGITS": False,
    "FIRST_EXIT": 0,
    "EXIT_INTERVAL": 1,
  }
  path = "flaxformer/t5x/configs/calm/architectures/calm_t5_1_1_flaxformer.gin"
  with gin.unlock_config():
    gin.clear_config()
    lines = [f"{name} = {value!r}" for name, value in bindings.items()]
    gin.parse_config_files_and_bindings([str(root / path)], lines)
    module = gin.query_parameter("%ARCHITECTURE").scoped_configurable_fn()
  return module


@contextlib.contextmanager
def exported(model: models.Model) -> Iterator[pathlib.Path]:
  """The model as a Hugging Face checkpoint, until the block ends."""
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory)
    huggingface.write(path, model.params, model.config)
    yield path


def transformers_systems(model, setting, depths) -> list[System]:
  """transformers' `generate`, greedy, with its cache."""
  del depths
  torch, transformers = imported("torch"), imported("transformers")
  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  with exported(model) as path:
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(path)
  theirs.eval()
  batches = [torch.tensor(b.astype(np.int64)) for b in models.batches(model, setting)]
  ends = None if model.eos_id < 0 else model.eos_id
  theirs.generation_config.eos_token_id = ends
  encoder = theirs.get_encoder()

  def encode():
    with torch.inference_mode():
      return [encoder(input_ids=b, attention_mask=(b > 0).long()) for b in batches]

  encoded = encode()

  def decode() -> Decoded:
    made = []
    with torch.inference_mode():
      for batch, states in zip(batches, encoded, strict=True):
        sequences = theirs.generate(
          encoder_outputs=states,
          attention_mask=(batch > 0).long(),
          do_sample=False,
          num_beams=1,
          max_new_tokens=setting.decode_length,
          # Theirs is sized by the encoder's layers.
          past_key_values=transformers.EncoderDecoderCache(
            transformers.DynamicCache(), transformers.DynamicCache()
          ),
        )
        made.append(_padded(sequences[:, 1:].numpy(), setting.decode_length))
    return Decoded(made)

  layers = model.config.num_decoder_layers
  name = f"transformers {transformers.__version__} generate, full depth"
  return [System(name, decode, encode, measured_layers=layers, peer=True)]


def ctranslate2_systems(model, setting, depths) -> list[System]:
  """CTranslate2, greedy, float32 and 8-bit weights; its encoder cannot be timed alone."""
  del depths
  ctranslate2 = imported("ctranslate2")
  names = [f"t{i}" for i in range(model.config.vocab_size)]
  names[:3] = ["<pad>", "</s>", "<unk>"]
  with exported(model) as path, tempfile.TemporaryDirectory() as directory:
    target = _converter(path, names).convert(directory, force=True)
    translators = {
      kind: ctranslate2.Translator(target, device="cpu", compute_type=kind)
      for kind in ("float32", "int8")
    }
  batches = [
    [[names[token] for token in row if token] for row in batch]
    for batch in models.batches(model, setting)
  ]
  made = []
  for kind, translator in translators.items():
    run = functools.partial(_translate, translator, names, batches, setting, model.eos_id)
    made.append(
      System(
        f"CTranslate2 {ctranslate2.__version__} {kind}, full depth",
        functools.partial(run, setting.decode_length),
        functools.partial(run, 1),
        measured_layers=model.config.num_decoder_layers,
        by_difference=True,
        peer=True,
      )
    )
  return made


def _translate(translator, names, batches, setting, eos_id: int, steps: int) -> Decoded:
  """What a translator of CTranslate2 makes of prompts, each a list of names."""
  index = {name: i for i, name in enumerate(names)}
  made = []
  for batch in batches:
    results = translator.translate_batch(
      batch,
      beam_size=1,
      max_decoding_length=steps,
      min_decoding_length=steps if eos_id < 0 else 1,
      return_end_token=True,
      max_batch_size=0,
    )
    rows = [[index[token] for token in result.hypotheses[0]] for result in results]
    made.append(_ragged(rows, setting.decode_length))
  return Decoded(made)


def _converter(path: pathlib.Path, names: list[str]) -> Any:
  """Their converter of transformers' models, without asking for a tokenizer."""
  theirs = imported("ctranslate2.converters.transformers")

  class Tokenizer:
    """What the loader reads of one."""

    pad_token, eos_token, unk_token, bos_token = "<pad>", "</s>", "<unk>", None

    def get_vocab(self):
      return {name: i for i, name in enumerate(names)}

    def convert_ids_to_tokens(self, token_id):
      return names[token_id]

  class Converter(theirs.TransformersConverter):
    def load_tokenizer(self, tokenizer_class, model_name_or_path, **kwargs):
      del tokenizer_class, model_name_or_path, kwargs
      return Tokenizer()

  return Converter(str(path))


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
  return np.pad(tokens, [(0, 0), (0, length - tokens.shape[1])])


def _ragged(rows: list[list[int]], length: int) -> np.ndarray:
  padded = np.zeros((len(rows), length), np.int64)
  for target, row in zip(padded, rows, strict=True):
    target[: len(row)] = row[:length]
  return padded


PEERS = (
  Peer("t5x", ("t5x.decoding", "t5x.models", "t5x.examples.t5.network"), t5x_systems),
  Peer(
    "t5x_calm",
    ("t5x.contrib.calm.models", "flaxformer.architectures.calm_t5.calm_architecture"),
    t5x_calm_systems,
  ),
  Peer("transformers", ("torch", "transformers"), transformers_systems),
  Peer("ctranslate2", ("torch", "transformers", "ctranslate2"), ctranslate2_systems),
)
