"""Tune: the whole compressed model is trained until its predictions are close to the dense one's."""
