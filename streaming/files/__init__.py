"""Checkpoint files: headers, reads that can fail but not kill, tensors that are views of a mapped file."""
