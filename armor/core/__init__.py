"""N:M patterns, block-diagonal matrices, packed cores, factorizations. Nothing of the project is imported here."""
