"""The T5 network: for training as T5X writes it, and one position at a time for decoding."""
