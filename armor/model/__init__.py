"""Where a model comes from, what it is made of, and how its tensors are read one by one."""
