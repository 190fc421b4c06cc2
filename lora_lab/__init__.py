"""LoRA Lab: the small package behind the notebooks. Start with lora.py."""
