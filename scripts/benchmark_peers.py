"""Other people's decoders on the same weights, for `benchmark.py`; what is not
there is named.

T5X and flaxformer take our parameter tree as it is; transformers reads the
checkpoint that `huggingface.write` makes, and CTranslate2 converts that one.
"""

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
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
    except Exception as error:
      # a broken installation is as good as none, and says why
      return (
        f"{package}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
      )
  return None


@dataclasses.dataclass(frozen=True)
class Peer:
  """Somebody else's decoder: the packages that it needs, and its rows of the
  table.
  """

  name: str
  packages: tuple[str, ...]
  systems: Callable[[models.Model, models.Setting, Sequence[int]], list[System]]


def _t5x_params(model: models.Model) -> dict[str, Any]:
  decoder = {
    k: v
    for k, v in model.params["decoder"].items()
    if not k.startswith("exit_")
  }
  return jax.tree.map(jnp.asarray, {**model.params, "decoder": decoder})


def _t5x_network(model: models.Model) -> Any:
  network = imported("t5x.examples.t5.network")
  config = model.config
  names = [
    name for name in network.T5Config.__dataclass_fields__ if name != "dtype"
  ]
  given = {name: getattr(config, name) for name in names}
  return network.Transformer(
    network.T5Config(dtype=jnp.dtype(config.dtype), **given)
  )


def _vocabulary(model: models.Model) -> Any:
  return imported("seqio").PassThroughVocabulary(
    model.config.vocab_size, max(model.eos_id, 0)
  )


@dataclasses.dataclass(frozen=True, eq=False)
class T5xLoop:
  """T5X's `temperature_sample`, greedy, around a model's "tokens to logits"."""

  model: models.Model
  setting: models.Setting
  module: Any  # T5X's or flaxformer's network
  # encoded_inputs, raw_inputs and max_decode_length are left
  to_logits: Callable[..., Any]
  sample: Callable[..., Any]

  def system(self, name: str, depth: float | None) -> System:
    params = _t5x_params(self.model)
    tokens = [
      jnp.asarray(batch) for batch in models.batches(self.model, self.setting)
    ]
    apply = functools.partial(self.module.apply, enable_dropout=False)
    encode = jax.jit(
      lambda params, t: apply({"params": params}, t, method=self.module.encode)
    )
    decode = jax.jit(self._decode)

    def encode_all():
      return jax.block_until_ready([encode(params, t) for t in tokens])

    encoded = encode_all()

    def run() -> Decoded:
      made = [
        decode(params, e, t) for e, t in zip(encoded, tokens, strict=True)
      ]
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
  """T5X's own network in T5X's own loop; a static k is the network of k
  layers.
  """
  del depths
  decoding = imported("t5x.decoding")
  t5x_models = imported("t5x.models")
  words = _vocabulary(model)
  module = _t5x_network(model)
  theirs = t5x_models.EncoderDecoderModel(
    module, words, words, optimizer_def=None
  )
  loop = T5xLoop(
    model,
    setting,
    module,
    theirs._compute_logits_from_slice,
    decoding.temperature_sample,
  )
  return [
    loop.system(
      "T5X temperature_sample, full depth", model.config.num_decoder_layers
    )
  ]


# Their names of the measures, the paper's own first; theirs compares one row
# only for 'state'.
CALM_METHODS = ("softmax_diff_approx", "softmax_max", "state")


def t5x_calm_systems(model, setting, depths) -> list[System]:
  """t5x/contrib/calm over flaxformer: exits forced by `min_exit`, threshold
  0.
  """
  decoding = imported("t5x.contrib.calm.decoding")
  calm_models = imported("t5x.contrib.calm.models")
  words = _vocabulary(model)
  module = _flaxformer(model)
  made = []
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

      def to_logits(state, t=theirs, **given):
        return t._compute_logits_from_slice_early_exit(
          state, conf_threshold=0.0, **given
        )

      loop = T5xLoop(
        model, setting, module, to_logits, decoding.temperature_sample
      )
      made.append(
        loop.system(f"t5x/contrib/calm {method}, forced {depth}", depth)
      )
  return made


def _flaxformer(model: models.Model) -> Any:
  """Their CALM network of the model's sizes, from their own gin files."""
  flaxformer = imported("flaxformer")
  gin = imported("gin")
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
def exported(model: Any) -> Iterator[pathlib.Path]:
  """A model with `params` and `config` as a Hugging Face checkpoint, until the
  block ends.
  """
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory)
    huggingface.write(path, model.params, model.config)
    yield path


# Package, class and options of models that `transformers` generates with.
GENERATORS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
  "transformers": ("transformers", "T5ForConditionalGeneration", {}),
  "onnxruntime": (
    "optimum.onnxruntime",
    "ORTModelForSeq2SeqLM",
    {"export": True},
  ),
  # With its caches inside the model, OpenVINO refuses a decoder deeper than the
  # encoder.
  "openvino": (
    "optimum.intel",
    "OVModelForSeq2SeqLM",
    {"export": True, "stateful": False},
  ),
}
# Threads that a peer is given: as many as it takes by itself, and one, which
# small products finish sooner.
THREADS = {"": 0, ", 1 thread": 1}


def _threads(way: str, count: int) -> dict[str, Any]:
  """Options of `from_pretrained` for so many threads, 0 being the library's own
  number.
  """
  # torch has a number for the whole process
  if not count or way == "transformers":
    return {}
  if way == "openvino":
    return {"ov_config": {"INFERENCE_NUM_THREADS": str(count)}}
  options = imported("onnxruntime").SessionOptions()
  options.intra_op_num_threads = count
  return {"session_options": options}


class Torch:
  """A model of `GENERATORS`, and its `generate`, greedy, with its cache."""

  def __init__(self, model: Any, way: str = "transformers", threads: int = 0):
    self.torch = imported("torch")
    self.transformers = imported("transformers")
    self.transformers.logging.set_verbosity_error()
    self.transformers.utils.logging.disable_progress_bar()
    package, name, given = GENERATORS[way]
    with exported(model) as path:
      given = given | _threads(way, threads)
      self.model = getattr(imported(package), name).from_pretrained(
        path, **given
      )
    self.model.generation_config.eos_token_id = (
      None if model.eos_id < 0 else model.eos_id
    )
    self._own_cache = way != "transformers"
    self.threads = threads or self.torch.get_num_threads()

  def generate(self, batch: np.ndarray, steps: int, **more: Any) -> np.ndarray:
    """Tokens [batch, at most steps] of prompts [batch, length], padded with
    0.
    """
    cache = self.transformers.DynamicCache
    if not self._own_cache:  # theirs is sized by the encoder's layers
      more["past_key_values"] = self.transformers.EncoderDecoderCache(
        cache(), cache()
      )
    prompts = self.torch.tensor(batch.astype(np.int64))
    with self.torch.inference_mode():
      made = self.model.generate(
        **({"input_ids": prompts} | more),
        attention_mask=(prompts > 0).long(),
        do_sample=False,
        num_beams=1,
        max_new_tokens=steps,
      )
    return made[:, 1:].numpy()


def torch_systems(way: str, model, setting, depths) -> list[System]:
  """`generate` after the encoder, which is timed alone."""
  del depths
  return [
    _torch_system(
      f"{way} {metadata.version(way)} generate, full depth{name}",
      theirs,
      model,
      setting,
    )
    for name, threads in THREADS.items()
    for theirs in [Torch(model, way, threads)]
  ]


def _torch_system(name: str, theirs: Torch, model, setting) -> System:
  batches = models.batches(model, setting)
  encoder = theirs.model.get_encoder()
  length = setting.decode_length

  def encode():
    theirs.torch.set_num_threads(theirs.threads)
    with theirs.torch.inference_mode():
      tensors = [
        theirs.torch.tensor(batch.astype(np.int64)) for batch in batches
      ]
      return [
        encoder(input_ids=b, attention_mask=(b > 0).long()) for b in tensors
      ]

  encoded = encode()

  def decode() -> Decoded:
    theirs.torch.set_num_threads(theirs.threads)
    made = []
    for batch, states in zip(batches, encoded, strict=True):
      given = {"input_ids": None, "encoder_outputs": states}
      made.append(_padded(theirs.generate(batch, length, **given), length))
    return Decoded(made)

  layers = model.config.num_decoder_layers
  return System(name, decode, encode, measured_layers=layers, peer=True)


class Translator:
  """CTranslate2's, greedy, of a model with weights in 'float32' or 'int8'."""

  def __init__(self, model: Any, kind: str, **options: Any):
    self._names = [f"t{i}" for i in range(model.config.vocab_size)]
    self._names[:3] = ["<pad>", "</s>", "<unk>"]
    self._index = {name: i for i, name in enumerate(self._names)}
    self._ends = model.eos_id >= 0
    with exported(model) as path, tempfile.TemporaryDirectory() as directory:
      target = _converter(path, self._names).convert(directory, force=True)
      make = imported("ctranslate2").Translator
      made = make(target, device="cpu", compute_type=kind, **options)
      self._translate = made.translate_batch

  def generate(
    self, rows: Iterable[Sequence[int]], steps: int, **more: Any
  ) -> list[list[int]]:
    """Tokens of each prompt, padding left out."""
    results = self._translate(
      [[self._names[token] for token in row if token] for row in rows],
      beam_size=1,
      max_decoding_length=steps,
      min_decoding_length=1 if self._ends else steps,
      return_end_token=True,
      max_batch_size=0,
      **more,
    )
    return [
      [self._index[token] for token in result.hypotheses[0]]
      for result in results
    ]


def ctranslate2_systems(model, setting, depths) -> list[System]:
  """CTranslate2, float32 and 8-bit weights, with the threads that it takes
  itself and with one, which small products finish sooner; its encoder cannot be
  timed alone.
  """
  del depths
  batches = models.batches(model, setting)

  def run(translator: Translator, steps: int) -> Decoded:
    made = [translator.generate(batch, steps) for batch in batches]
    return Decoded([_ragged(rows, setting.decode_length) for rows in made])

  return [
    System(
      f"CTranslate2 {imported('ctranslate2').__version__} {kind}, full "
      f"depth{name}",
      functools.partial(run, translator, setting.decode_length),
      functools.partial(run, translator, 1),
      measured_layers=model.config.num_decoder_layers,
      by_difference=True,
      peer=True,
    )
    for kind in ("float32", "int8")
    for name, threads in THREADS.items()
    for translator in [Translator(model, kind, intra_threads=threads)]
  ]


def _converter(path: pathlib.Path, names: list[str]) -> Any:
  """Their converter of transformers' models, without asking for a tokenizer."""
  theirs = imported("ctranslate2.converters.transformers")

  class Tokenizer:
    """What the loader reads of one."""

    pad_token = "<pad>"
    eos_token = "</s>"
    unk_token = "<unk>"
    bos_token = None

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
  Peer(
    "t5x",
    ("t5x.decoding", "t5x.models", "t5x.examples.t5.network"),
    t5x_systems,
  ),
  Peer(
    "t5x_calm",
    (
      "t5x.contrib.calm.models",
      "flaxformer.architectures.calm_t5.calm_architecture",
    ),
    t5x_calm_systems,
  ),
  *(
    Peer(way, ("torch", way, package), functools.partial(torch_systems, way))
    for way, (package, _, _) in GENERATORS.items()
  ),
  Peer(
    "ctranslate2", ("torch", "transformers", "ctranslate2"), ctranslate2_systems
  ),
)
