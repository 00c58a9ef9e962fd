"""vimfast: ImageNet shards, a DALI loader and a distributed trainer for Vision Mamba."""

__version__ = "0.2.0"
