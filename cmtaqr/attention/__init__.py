"""Attention with a local bias per query."""
from .dispatch import biased_attention, planned
from .reference import attention_reference, window_attention_reference
from .window import window_attention

__all__ = ["attention_reference", "biased_attention", "planned", "window_attention", "window_attention_reference"]
