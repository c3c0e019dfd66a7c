"""Triton kernels that receive a Problem: pointers, masks and `tl.dot`, what every vendor's Triton takes.

An absent tensor is None, which Triton turns into a compile-time branch. Strides come in units of UNIT elements (16
bytes where everything is aligned, else 1), so that the compiler knows what it may load at once.
"""
