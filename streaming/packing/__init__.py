"""Weights in fewer bytes, the same bits: the code, and who packs and unpacks on a device. May import devices and below."""
