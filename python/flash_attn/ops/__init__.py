"""What surrounds attention in a transformer: norms, activations, losses, linear layers, on PyTorch operations."""
