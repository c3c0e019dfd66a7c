"""Other libraries on this one: flash_attn.integrations.transformers and flash_attn.integrations.sdpa.

Neither is imported before it is asked for, and nothing is patched before its enable() (or `with sdpa.routed():`).
"""
