"""The compilations of the attention kernels that the table has."""


def variants(arch):
    yield from ()
