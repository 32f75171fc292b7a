"""Equal token ids of a split are one object."""

from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data.splits.row_encoder import NumberSharing


def test_equal_numbers_of_different_rows_are_one_object():
    share = NumberSharing()
    first, second = (Encoded((int("70000"), int("5")), (), (int("70000"),), ()) for _ in range(2))
    assert first.ids[0] is not second.ids[0]  # large numbers are separate objects otherwise
    shared = share(first), share(second)
    assert shared == (first, second)
    assert shared[0].ids[0] is shared[1].ids[0] is shared[1].targets[0]
