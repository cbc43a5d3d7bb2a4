"""A second model like the one that came in: streamed, on another device, or over several."""
