"""The names under which upstream keeps its Triton kernels. Here they are PyTorch operations, on every device."""
