"""Weights in fewer bytes and the same bits: the code, and who packs and unpacks. May import devices and below."""
