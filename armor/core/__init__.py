"""The vocabulary of the project: N:M patterns, block-diagonal matrices, packed cores; what files hold of them."""
