"""Copies of weights that the processes of a host share: their pages, who holds them, and how they are asked for."""
