"""Softmax, forward and backward: ours, torch's operator, naive PyTorch."""

OP = "softmax"


def test_softmax(race, entry, contender):
    race(entry, contender)
