"""What a compressed model has lost: perplexity on a text, the distance from the dense model, accuracy on tasks."""
