"""Workflows of ComfyUI as JSON: what streams their models is put into them. Plain Python; nothing of ComfyUI runs."""
