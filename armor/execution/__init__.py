"""How a job runs: atomic files, resuming, devices and threads, hashes of code. Importing it does not import torch."""
