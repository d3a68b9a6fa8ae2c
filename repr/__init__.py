"""Pretrain image and image-text encoders with contrastive and hybrid objectives."""

__version__ = "0.1.0"
