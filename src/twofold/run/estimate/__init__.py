"""What a run will take: memory, disk, seconds."""
