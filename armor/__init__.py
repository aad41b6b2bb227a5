"""ARMOR Pipeline: one-shot 2:4 compression of large language models by adaptive matrix factorization."""

__version__ = "0.1.0"
