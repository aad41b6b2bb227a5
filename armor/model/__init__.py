"""Where a model comes from, and what it is made of."""
