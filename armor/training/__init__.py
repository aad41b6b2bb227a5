"""What takes gradients: refine, each layer against the dense one; tune, the whole; how much each linear matters."""
