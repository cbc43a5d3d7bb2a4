"""Many prompts on many GPUs: one ComfyUI in front, and behind it one real ComfyUI for each GPU.

Nothing here imports ComfyUI. What has to know it, the queue of the ComfyUI in front, is in ``nodes/fleet``.
"""
