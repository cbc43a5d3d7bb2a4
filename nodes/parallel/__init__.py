"""Several GPUs at work on one step of a MODEL."""
