"""Computing with a model: packed linears and their kernels, loading, one decoder layer at a time."""
