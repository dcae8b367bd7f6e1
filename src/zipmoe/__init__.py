"""Run Mixture-of-Experts language models that do not fit in memory, bit for bit as published."""

__version__ = "0.1.0"
