"""Layers that attention models are made of, with upstream's names, attributes and state_dict keys."""
