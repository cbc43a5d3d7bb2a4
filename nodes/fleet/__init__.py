"""What the fleet needs of ComfyUI itself: the front's queue and routes, and the end of a worker."""
