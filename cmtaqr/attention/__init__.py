"""Attention with a local bias per query."""
from .dispatch import biased_attention
from .reference import attention_reference, window_attention_reference

__all__ = ["attention_reference", "biased_attention", "window_attention_reference"]
