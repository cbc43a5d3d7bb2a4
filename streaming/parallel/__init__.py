"""Several devices at work on one step: each computes a part of the tokens, and attention sees them all."""
