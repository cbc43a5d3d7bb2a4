"""A MODEL that streams: its patchers, its steps, its patches, and its parts on other devices."""
