"""Rows and a base model in, a LoRA adapter out."""
