"""Weights in fewer bytes, and the same bits: the code, and who decodes it on a device. May import devices and below."""
