"""What is on disk: shards, statistics, factors, packed checkpoints, and the records between stages as types."""
