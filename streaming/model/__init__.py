"""A model as it is cut: blocks, units, how their tensors are packed, and what modules hold meanwhile."""
