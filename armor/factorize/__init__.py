"""From a weight and its calibration statistics to a factorization: pruning, the published optimiser, the solver."""
