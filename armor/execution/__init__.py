"""Ground floor: atomic files, devices and threads, fingerprints. Nothing here imports torch when it is imported."""
