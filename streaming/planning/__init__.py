"""What to keep on a device and what to stream: numbers in, a plan out.

Pure: no tensors, no streams, no clock. Every other room may ask here, and nothing is imported from them."""
