"""Which rows make up a micro-batch is a function of its number alone."""

from collections import Counter

import pytest

from train_dreambooth_lora_sdxl import (
    BatchSampler,
    micro_batches,
    plan_epoch,
    plan_steps,
    position_seed,
    row_at,
    shuffled,
)


@pytest.mark.parametrize("rows, batch_size", [(5, 4), (5, 1), (1, 3), (7, 7), (3, 8), (12, 5)])
def test_trap_9_every_batch_is_full_and_every_picture_counts_alike(rows, batch_size):
    order = BatchSampler([range(rows)], (), batch_size, seed=3)
    batches = [order.rows(n) for n in range(rows * 6)]
    assert all(len(batch) == batch_size for batch in batches)
    counts = Counter(row.sample for batch in batches for row in batch)
    assert set(counts.values()) == {6 * batch_size}


def test_looks_are_counted():
    """The n-th time that a sample comes, it was looked at n times before."""
    seen = Counter()
    for position in range(70):
        sample, looks = row_at(range(7), 3, position)
        assert looks == seen[sample]
        seen[sample] += 1


def test_epochs_differ_and_are_reproducible():
    first, second = ([shuffled(20, 1, epoch) for epoch in range(4)] for _ in range(2))
    assert first == second and len(set(first)) == 4
    assert shuffled(20, 2, 0) != first[0]


def test_buckets_never_mix_and_nobody_is_dropped():
    buckets = [(0, 1, 2), (3,), (4, 5, 6, 7, 8)]
    rows = [batch for epoch in range(4) for batch in plan_epoch(buckets, 4, 0, epoch)]
    batches = [[row.sample for row in batch] for batch in rows]
    assert all(any(set(batch) <= set(bucket) for bucket in buckets) for batch in batches)
    counts = Counter(row for batch in batches for row in batch)
    assert set(counts) == set(range(9)) and set(counts.values()) == {4}


def test_class_rows_stand_beside_instance_rows():
    order = BatchSampler([range(5)], range(5, 12), 3, seed=0)
    for n in range(10):
        rows = [row.sample for row in order.rows(n)]
        assert all(row < 5 for row in rows[:3]) and all(row >= 5 for row in rows[3:]) and len(rows) == 6
    assert set(Counter(row.sample for n in range(7) for row in order.rows(n)[3:]).values()) == {3}


class Rank:
    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def test_trap_7_the_same_work_is_numbered_alike_on_any_number_of_ranks():
    alone = list(micro_batches(5, 4, Rank(0, 1)))
    shared = sorted(n for rank in range(2) for n in micro_batches(5, 2, Rank(rank, 2)))
    assert alone == shared == [20, 21, 22, 23]
    assert len({position_seed(0, "noise", n) for n in range(10_000)}) == 10_000


def test_steps_are_counted_in_pictures(train):
    args = train.args(max_train_steps=None, num_train_epochs=8, train_batch_size=4, gradient_accumulation_steps=2)
    assert plan_steps(args, 5, 1).total_steps == 5  # 40 pictures, eight a step
    assert plan_steps(args, 5, 2).total_steps == 3
