"""LoRA Lab: the small package behind the notebooks. Start with lora.py."""

__version__ = "0.1.0"
