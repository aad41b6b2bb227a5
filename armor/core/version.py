"""The version of this package, where all of it may read it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
