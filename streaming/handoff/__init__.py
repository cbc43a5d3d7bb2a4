"""Activations that go from one device to another between blocks, and come back to who asks for them."""
