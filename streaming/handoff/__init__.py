"""Activations that go from one device to another between blocks, and come back when code there uses them."""
