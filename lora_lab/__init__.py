"""LoRA Lab: the small package behind the notebooks. Start with lora.py; every module stands alone."""

__version__ = "0.1.0"
