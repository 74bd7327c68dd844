"""ulimi: train, judge and use language models for isiZulu and for languages like it.

This package imports nothing heavy by itself: PyTorch is imported by the modules that train.
"""

__version__ = "0.1.0"
