"""The order of batches, and what they are padded to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfs_jax.data import Batches, Encoded, eval_batches
from mlfs_jax.data.batches import buckets_up_to
from mlfs_jax.errors import ConfigError


def fake_encoded(lengths, max_length=128, types=False, problem="classification", seed=0) -> Encoded:
    """Examples whose every token is the example's number plus one, so that a batch shows which rows it has."""
    lengths = np.asarray(lengths)
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    labels = np.arange(len(lengths)).astype(np.int32 if problem == "classification" else np.float32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Encoded(ids, (ids % 2).astype(np.int32) if types else None, offsets, labels, 0, max_length)


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    window=st.integers(1, 5),
)
def test_an_epoch_takes_no_example_twice(lengths, batch_size, seed, window):
    batch_size = min(batch_size, len(lengths))
    encoded = fake_encoded(lengths, 100, types=True)
    batches = Batches(encoded, batch_size, seed=seed, window=window)
    assert batches.epoch_steps == len(lengths) // batch_size
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.epoch_steps, (epoch + 1) * batches.epoch_steps):
            batch = batches[step]
            width = batch["input_ids"].shape[1]
            assert width in batches.buckets and width == batches.width(step)
            assert batch["input_ids"].shape == batch["attention_mask"].shape == (batch_size, width)
            longest = batch["attention_mask"].sum(1).max()
            assert not any(longest <= b < width for b in batches.buckets)
            for r, label in enumerate(batch["labels"]):
                n = lengths[label]
                assert batch["attention_mask"][r].tolist() == [1] * n + [0] * (width - n)
                assert batch["input_ids"][r].tolist() == [label + 1] * n + [0] * (width - n)
                assert batch["token_type_ids"][r].tolist() == [(label + 1) % 2] * n + [0] * (width - n)
            seen += batch["labels"].tolist()
        assert len(seen) == len(set(seen)) == batches.epoch_steps * batch_size


def test_a_batch_depends_only_on_seed_and_step():
    encoded = fake_encoded(np.random.default_rng(0).integers(5, 120, 333))
    straight = Batches(encoded, 16, seed=5)
    steps = [0, 19, 20, 61, 3, 45]
    for step in steps:  # any order, a fresh object each time: what a resumed run sees
        fresh = Batches(encoded, 16, seed=5)[step]
        assert all(np.array_equal(fresh[k], v) for k, v in straight[step].items())
    epochs = [np.concatenate([straight.rows(e * 20 + s) for s in range(20)]) for e in range(3)]
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(Batches(encoded, 16, seed=6).rows(0), straight.rows(0))


def test_no_example_is_always_dropped():
    batches = Batches(fake_encoded([5] * 31), 10, seed=0)
    seen = {int(i) for step in range(30) for i in batches.rows(step)}
    assert seen == set(range(31))


def test_grouping_by_length_saves_padding_and_keeps_batches_in_random_order():
    lengths = np.random.default_rng(0).integers(5, 128, 2000)
    encoded = fake_encoded(lengths)

    def share_of_padding(window):
        batches = Batches(encoded, 16, seed=0, window=window)
        masks = [batches[s]["attention_mask"] for s in range(batches.epoch_steps)]
        return 1 - sum(m.sum() for m in masks) / sum(m.size for m in masks)

    # The least that these buckets allow: every example in its own smallest bucket.
    best = 1 - lengths.sum() / sum(min(b for b in buckets_up_to(128) if b >= n) for n in lengths)
    assert share_of_padding(50) < best + 0.03 < 0.4 < share_of_padding(1)
    batches = Batches(encoded, 16, seed=0)
    widths = [batches.width(s) for s in range(batches.epoch_steps)]
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.4
    assert set(widths) <= set(batches.buckets) and len(batches.buckets) <= 6


def test_buckets_end_at_max_length():
    assert buckets_up_to(128) == (16, 32, 48, 64, 96, 128)
    assert buckets_up_to(100) == (16, 32, 48, 64, 96, 100)
    assert buckets_up_to(8) == (8,)
    assert buckets_up_to(64, buckets=(64, 32, 999)) == (32, 64)


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=50), batch_size=st.integers(1, 9))
def test_eval_batches_cover_every_example_once(lengths, batch_size):
    batches = eval_batches(fake_encoded(lengths, 64), batch_size)
    assert len(batches) == -(-len(lengths) // batch_size)
    seen = []
    for batch in batches:
        assert batch["input_ids"].shape[0] == batch_size and batch["input_ids"].shape[1] in buckets_up_to(64)
        assert batch["weight"].dtype == np.float32 and batch["attention_mask"].any(axis=1).all()
        seen += batch["labels"][batch["weight"] == 1].tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert sum(b["weight"].sum() for b in batches) == len(lengths)


def test_dtypes_for_classes_and_scores():
    for problem, dtype in (("classification", np.int32), ("regression", np.float32)):
        encoded = fake_encoded([4, 5, 6], problem=problem)
        for batch in (Batches(encoded, 2)[0], eval_batches(encoded, 2)[0]):
            assert batch["labels"].dtype == dtype
            assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int32


def test_mistaken_batch_settings():
    encoded = fake_encoded([4, 5, 6])
    for options, message in (
        ({"batch_size": 4}, "batch_size is 4; expected 1 to 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "seed": -1}, "seed is -1"),
        ({"batch_size": 1, "window": 0}, "window is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Batches(encoded, **options)
    with pytest.raises(ConfigError, match="step is -1"):
        Batches(encoded, 1)[-1]
    with pytest.raises(ConfigError, match="batch_size is 0"):
        eval_batches(encoded, 0)


def test_subset_keeps_texts_and_labels_together():
    encoded = fake_encoded([3, 5, 2, 7, 4], types=True)
    small = encoded.subset(3)
    assert len(small) == 3 and encoded.subset(9) is encoded and len(encoded.take([])) == 0
    for i, label in enumerate(small.labels):
        part = slice(small.offsets[i], small.offsets[i + 1])
        assert set(small.ids[part]) == {label + 1} and small.lengths[i] == encoded.lengths[label]
        assert set(small.types[part]) == {(label + 1) % 2}
    assert not np.array_equal(encoded.subset(2, seed=1).labels, encoded.subset(2, seed=3).labels)
    with pytest.raises(ConfigError, match="at least 1"):
        encoded.subset(0)
