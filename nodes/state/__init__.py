"""What a step may change beside its output, so that it can be put back before the step runs again."""
