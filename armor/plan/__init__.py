"""What a configuration will take before anything runs: jobs, memory, disk, size, speed, time. From headers alone."""
