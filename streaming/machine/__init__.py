"""What this machine has: its GPUs and their names, free VRAM, and the host memory that this process may use."""
