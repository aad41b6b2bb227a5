"""Statistics of the inputs of all linears, from text, with one decoder layer in memory at a time."""
