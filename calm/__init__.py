"""Confident Adaptive Language Modeling: early exits for T5, with a promise.

One token's path, from the loop to the promise:

  1. `calm.decode.loop.decode` asks for one token per row and position;
  2. `calm.exits.walk.Walk` goes up `calm.t5.decoder.DecoderStep` and decides;
  3. `calm.exits.confidence.Softmax` meets `calm.exits.schedules.Decaying`;
  4. `calm.exits.propagation.ExitState` is what the skipped layers get (section
  3.2);
  5. `calm.decode.engines.Deferred` writes it once a later token needs it;
  6. `calm.calibrate.certify.calibrate` turns the texts' losses into a threshold
  and a promise.

Importing `calm` imports nothing; its names are loaded when they are first used.
`calm.calibrate` computes with numpy and scipy, without JAX.
"""

__version__ = "0.1.0"

# Public name -> where it is: a module, or `module:attribute`.
_NAMES = {
  "NEVER_EXIT": "calm.calibrate:NEVER_EXIT",
  "Calibration": "calm.calibrate:Calibration",
  "DecodeOptions": "calm.inference:DecodeOptions",
  "Predictor": "calm.inference:Predictor",
  "calibrate": "calm.calibrate",
  "checkpoints": "calm.checkpoints",
  "data": "calm.data",
  "decode": "calm.decode",
  "exits": "calm.exits",
  "fit": "calm.fitting:fit",
  "fitting": "calm.fitting",
  "inference": "calm.inference",
  "load": "calm.inference:load",
  "t5": "calm.t5",
  "training": "calm.training",
}
__all__ = [*_NAMES]
# Packages, one of each extra, that a module needs beside calibration's; the
# others decode.
_NEEDS = {
  "calm.calibrate": (),
  "calm.fitting": ("jax", "optax", "jinja2"),
  "calm.training": ("jax", "optax"),
}

# what type checkers take for true, without importing `typing`
TYPE_CHECKING = False
if TYPE_CHECKING:
  from calm import calibrate as calibrate
  from calm import checkpoints as checkpoints
  from calm import data as data
  from calm import decode as decode
  from calm import exits as exits
  from calm import fitting as fitting
  from calm import inference as inference
  from calm import t5 as t5
  from calm import training as training
  from calm.calibrate import NEVER_EXIT as NEVER_EXIT
  from calm.calibrate import Calibration as Calibration
  from calm.fitting import fit as fit
  from calm.inference import DecodeOptions as DecodeOptions
  from calm.inference import Predictor as Predictor
  from calm.inference import load as load


def __getattr__(name: str) -> object:
  """Loads a public name on its first use."""
  if name not in _NAMES:
    raise AttributeError(
      f"Expected a name that calm has, got {name!r}; it has "
      f"{', '.join(_NAMES)}."
    )
  import importlib

  module, _, attribute = _NAMES[name].partition(":")
  value = importlib.import_module(module)
  return globals().setdefault(
    name, getattr(value, attribute) if attribute else value
  )


def __dir__() -> list[str]:
  """Public names, loaded or not, for tab completion and `help`; those that can
  be loaded.
  """
  from importlib import util

  hidden = {
    name
    for name, place in _NAMES.items()
    for package in _NEEDS.get(place.partition(":")[0], ("jax",))
    if not util.find_spec(package)
  }
  return sorted({*globals(), *_NAMES} - hidden)
