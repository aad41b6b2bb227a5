"""The doors: the `armor` command, the server that its jobs are forked from, and `armor.compress` for notebooks."""
