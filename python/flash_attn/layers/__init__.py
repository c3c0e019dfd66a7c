"""Layers: rotary embedding, patches of images."""
