"""The stages that take gradients: refine trains each layer, tune the whole model; sensitivity weighs each linear."""
