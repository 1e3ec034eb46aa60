"""Two slots for all layers: whatever order the layers are needed in, each is read whole and right."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.peers import PeerBase, part_size

SIZES = [1000, 256, 5000, 777, 1]


def shards_of(blobs: list[torch.Tensor], world_size: int) -> list[torch.Tensor]:
    """Every rank's parts of all layers, one after another."""
    padded = [torch.nn.functional.pad(b, (0, part_size(len(b), world_size) * world_size - len(b))) for b in blobs]
    return [torch.cat([p.chunk(world_size)[rank] for p in padded]) for rank in range(world_size)]


def base_of(rank: int, world_size: int) -> tuple[PeerBase, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    blobs = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in SIZES]
    return PeerBase(shards_of(blobs, world_size), SIZES, rank, None), blobs


@given(
    world_size=st.integers(1, 4),
    rank=st.integers(0, 3),
    walk=st.lists(st.tuples(st.integers(0, len(SIZES) - 1), st.sampled_from([2, -2])), max_size=30),
)
def test_a_layer_is_right_whenever_it_is_opened(world_size, rank, walk):
    base, blobs = base_of(rank % world_size, world_size)
    for index, then in walk:
        assert torch.equal(base.open(index)[: SIZES[index]], blobs[index])
        base.close(index, then)


def test_a_step_reads_every_layer_twice_less_those_at_the_turns():
    base, _ = base_of(0, 2)
    read = []
    copy = base._copy
    base._copy = lambda index: (read.append(index), copy(index))
    for _ in range(2):
        for index in range(5):
            base.open(index)
            base.close(index, 2)
        for index in reversed(range(5)):
            base.open(index)
            base.close(index, -2)
    assert read == [0, 2, 1, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0]


def test_what_is_forgotten_is_read_again():
    base, blobs = base_of(0, 1)
    base.open(1)
    base.own(1)[5] ^= 1
    base.forget()
    assert base.open(1)[5] == blobs[1][5] ^ 1
