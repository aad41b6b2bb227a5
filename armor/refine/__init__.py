"""Refine: each compressed decoder layer is trained until its output is close to the dense one's."""
