"""Layer norm, forward and backward: ours, torch's operator, naive PyTorch."""

OP = "layer_norm"


def test_layer_norm(race, entry, contender):
    race(entry, contender)
