"""The only part of the pack that speaks ComfyUI."""
