"""What a model has lost: perplexity on blocks of text, the distance from the dense model, accuracy on tasks."""
