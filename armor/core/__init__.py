"""The ground: N:M patterns, block-diagonal matrices, packed cores, factorizations; typed fields; ArmorError."""
