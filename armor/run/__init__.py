"""A run of the workflow: its jobs and paths, what is done, and why something would run again."""
