"""Token compression as nodes of ComfyUI; README.md says how to install them."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
