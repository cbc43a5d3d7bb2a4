"""What this machine has: its GPUs and their names, VRAM that is free, the memory that it allows us."""
