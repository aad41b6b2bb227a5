"""What a model has lost: perplexity on blocks of text."""
