"""ComfyUI as it is here: its version, its devices, what differs between hosts, and what we rely on."""
