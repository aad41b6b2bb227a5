"""The `armor` command, and the server that its jobs are forked from."""
