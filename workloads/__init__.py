"""Tune, train and serve a small BERT text classifier on Ray."""

__version__ = "0.1.0"
