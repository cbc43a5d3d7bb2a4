"""A step on one device: what begins and ends, what is copied ahead, where it lies, how long it took."""
