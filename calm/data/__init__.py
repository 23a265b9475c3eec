"""Texts in, tokens out: vocabularies, files of examples, batches for training and decoding."""
