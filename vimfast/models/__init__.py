"""Vision Mamba and its names in timm's registry: importing this package registers them."""

from vimfast.models.registry import create_model
from vimfast.models.vision_mamba import VisionMamba

__all__ = ["VisionMamba", "create_model"]
