"""The C sources of the CPU kernel. Whoever imports this package has them in the hash of its code."""
