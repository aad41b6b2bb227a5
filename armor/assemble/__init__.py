"""From the factors of all decoder layers to a checkpoint that transformers loads, and its check."""
