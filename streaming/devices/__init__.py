"""One device: memory, copy streams and events. CUDA, and virtual devices in RAM that behave like it."""
