"""Benchmarks of fastattn against naive PyTorch, torch's fused operators and FlexAttention.

`fastattn bench` is the way in. Nothing else in the package imports this one.
"""
