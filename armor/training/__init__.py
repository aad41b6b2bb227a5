"""Training after factorization: refine, each layer against the dense one, and tune, the whole against its output."""
