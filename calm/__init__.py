"""Confident Adaptive Language Modeling: early exits for T5, with a promise.

The pipeline, module by module (each step's result is the next one's first argument):

  text -> `vocabulary` -> tokens -> `network.Transformer.encode` -> encoder states
  one token through the decoder layers until `confidence` clears the threshold -> `exits`
  one sequence -> `decoding` (knows no network) bound to a model by `inference`
  generations at every threshold of a grid, on disk -> `calibrate.generations`
  generations -> losses -> p-values -> tested thresholds -> `calibrate.calibration`
  a calibrated threshold -> served by `inference`, with the guarantee attached

`calm.calibrate` needs numpy and scipy only. Importing `calm` imports nothing.
"""

__version__ = "0.1.0"
