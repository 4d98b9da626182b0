"""Attention, forward and backward: ours, torch's operator, naive PyTorch."""

OP = "attention"


def test_attention(race, entry, contender):
    race(entry, contender)
