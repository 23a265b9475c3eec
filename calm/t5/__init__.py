"""The T5 network: for training as T5X writes it, and one position at a time for
decoding.
"""

from calm.t5.network import T5Config, Transformer

__all__ = ["T5Config", "Transformer"]
