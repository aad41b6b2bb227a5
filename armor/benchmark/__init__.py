"""What a compressed model saves: bytes on disk and in memory, time to load, tokens per second."""
