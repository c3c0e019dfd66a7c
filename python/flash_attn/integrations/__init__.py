"""Other libraries on this one: flash_attn.integrations.transformers, .diffusers and .sdpa.

None is imported before it is asked for, and nothing is patched before its enable() (or `with sdpa.routed():`).
"""
