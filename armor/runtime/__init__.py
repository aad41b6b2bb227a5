"""Computing with packed weights: the layer that stands in for a compressed linear, and how models are loaded."""
