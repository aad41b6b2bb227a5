"""From a weight and its calibration statistics to a factorization: pruning methods, the published ARMOR optimiser, the solver."""
