"""What a run will take, before it starts: jobs, memory, disk, size, speed, time. Read from headers alone."""
