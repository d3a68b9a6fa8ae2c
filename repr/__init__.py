"""Pretrain image and image-text encoders with contrastive and hybrid objectives."""

__version__ = "0.2.0"
