"""The public functions, one file a family: the function, then its autograd.Function.

A folder of its own, and nothing re-exported here, so that no function shadows its module.
"""
