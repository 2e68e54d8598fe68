"""What must hold of the pure functions for any input that hypothesis can think of."""

import json
import math
import random
import struct
from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import train_dreambooth_lora_sdxl as trainer

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 2**40))
def test_every_row_of_every_bucket_comes_equally_often(sizes, batch_size, seed):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    buckets = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    epochs = [trainer.plan_epoch(buckets, batch_size, seed, epoch) for epoch in range(batch_size)]
    batches = [[row.sample for row in batch] for epoch in epochs for batch in epoch]
    assert all(len(batch) == batch_size and any(set(batch) <= set(b) for b in buckets) for batch in batches)
    counts = Counter(row for batch in batches for row in batch)
    assert set(counts) == set(range(sum(sizes))) and set(counts.values()) == {batch_size}


@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 200))
def test_a_micro_batch_is_a_function_of_its_number(rows, classes, batch_size, seed, n):
    def order():
        return trainer.Order([range(rows)], range(rows, rows + classes), batch_size, seed)

    walked, jumped = order(), order()
    for before in range(n):
        walked.rows(before)
    found = jumped.rows(n)
    assert found == walked.rows(n) and len(found) == batch_size * (2 if classes else 1)


SIDES = st.integers(1, 200).map(lambda eighths: 8 * eighths)


@given(SIZES, st.tuples(SIDES, SIDES), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_view_lies_inside_the_resized_picture(size, bucket, center, flip, seed):
    width, height = trainer.resized(size, bucket)
    assert (width == bucket[0] and height >= bucket[1]) or (height == bucket[1] and width >= bucket[0])
    assert math.isclose(width / height, size[0] / size[1], rel_tol=1.0 / min(bucket))
    view = trainer.choose_view((width, height), bucket, center, flip, random.Random(seed))
    assert 0 <= view.top <= height - bucket[1] and 0 <= view.left <= width - bucket[0]
    assert flip or not view.flip


@given(SIZES, st.sampled_from([512, 768, 1024]), st.sampled_from([1.0, 1.5, 2.0, 9.0]))
def test_a_bucket_has_the_pictures_shape_and_enlarges_it_no_more_than_allowed(size, resolution, limit):
    buckets = trainer.make_buckets("auto", resolution)
    width, height = trainer.choose_bucket(size, buckets, limit)
    assert width % 8 == height % 8 == 0 and width * height <= resolution**2
    if min(size) * limit >= 64:
        assert max(width / size[0], height / size[1]) <= limit
    if min(size) * limit > 2 * resolution:  # nothing in the way
        best = min(abs(math.log(w / h * size[1] / size[0])) for w, h in buckets)
        assert math.isclose(abs(math.log(width / height * size[1] / size[0])), best)


@given(st.text())
def test_nothing_printable_is_a_control_character(text):
    told = trainer.printable(text)
    assert not any(ord(sign) < 32 and sign not in "\t\n" or 127 <= ord(sign) < 160 for sign in told)


@given(st.lists(st.one_of(st.binary(), st.text(), st.integers()), max_size=5))
def test_a_key_tells_parts_apart(parts):
    joined = trainer.content_key(*parts)
    assert trainer.content_key(*parts) == joined and len(joined) == 40
    assert trainer.content_key(*parts, b"") != joined
    if len(parts) > 1 and isinstance(parts[0], bytes) and isinstance(parts[1], bytes) and parts[1]:
        moved = parts[0] + parts[1][:1], parts[1][1:]
        assert trainer.content_key(*moved, *parts[2:]) != joined


LISTS = st.lists(st.integers(), max_size=2)
VALUES = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(), LISTS)
KEYS = st.one_of(st.sampled_from(["rank", "seed", "random_flip", "instance_prompt", "lr_power"]), st.text())


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_a_configuration_is_read_or_refused_in_one_sentence(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    parser = trainer.make_parser()
    try:
        words = trainer.config_as_words(parser, str(path))
        args, strangers = parser.parse_known_args(
            ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x", *words]
        )
    except trainer.UserError as error:
        assert str(error)
        return
    assert not strangers
    for key, value in values.items():
        assert value is None or getattr(args, key) == type(getattr(args, key))(value)


@given(st.binary(max_size=200))
def test_any_bytes_are_told_from_safetensors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    path.write_bytes(data)
    if trainer.safetensors_header(path):
        length = struct.unpack("<Q", data[:8])[0]
        assert isinstance(json.loads(data[8 : 8 + length]), dict)


@pytest.mark.parametrize("kept", [0, 1, 17])
def test_a_whole_file_is_known_by_its_header(tmp_path, kept):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.zeros(kept, dtype=torch.float16)}, path, {"format": "pt"})
    assert trainer.safetensors_header(path)
