"""What must hold of the pure functions for any input that hypothesis can think of."""

import csv
import io
import json
import math
import random
import struct
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
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
        return trainer.BatchSampler([range(rows)], range(rows, rows + classes), batch_size, seed)

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


LONG = "x" * 140_000  # csv takes no field so long
TEXTS = st.one_of(st.text(), st.text().map(json.dumps), st.sampled_from(["\u2028", "a\nb", "a\r\nb", "\0", LONG]))


@pytest.fixture(scope="module")
def pictured(tmp_path_factory) -> Path:
    """A folder with one picture, and one outside of it."""
    folder = tmp_path_factory.mktemp("captions") / "data"
    folder.mkdir()
    for path in (folder / "a.png", folder.parent / "outside.png"):
        path.touch()
    return folder


def as_table(rows: list[list[str]]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["file_name", "text"], *rows])
    return buffer.getvalue()


FORMS = {
    "metadata.jsonl": lambda text: json.dumps({"file_name": "a.png", "text": text}),
    "a metadata.jsonl": lambda text: json.dumps({"text": text, "file_name": "a.png"}, ensure_ascii=False),
    "metadata.csv": lambda text: as_table([["a.png", text]]),
}



@given(TEXTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_caption_comes_back_as_it_was_written_or_is_refused(pictured, form, text):
    path = pictured / form.split()[-1]
    path.write_bytes(FORMS[form](text).encode())
    try:
        assert trainer.read_metadata(path) == {pictured / "a.png": text}
    except trainer.UserError:
        assert text == LONG and path.suffix == ".csv"


@pytest.mark.parametrize(
    "name",
    [
        "a\x1b.png",
        "a\nb.png",
        "a" * 300 + ".png",
        LONG,
        "a/" * 3000 + "a.png",
    ],
)
def test_an_odd_name_in_metadata_is_refused_in_one_sentence(pictured, name):
    (pictured / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a dog"}))
    with pytest.raises(trainer.UserError, match="line 1: .* is not there") as refused:
        trainer.read_metadata(pictured / "metadata.jsonl")
    assert len(str(refused.value)) < 1000 and "\n" not in trainer.printable(str(refused.value))


NAMES = st.one_of(
    st.sampled_from(["a.png", "b/../a.png", "../data/a.png", "../outside.png", "..", "", "a.png\0", "\ud800"]),
    st.text(max_size=9),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file_name", "text", "x"]), inner),
    max_leaves=6,
)
ROWS = st.fixed_dictionaries({"file_name": NAMES, "text": TEXTS})
LINES = {
    "metadata.jsonl": st.one_of(ROWS.map(json.dumps), JSON.map(json.dumps), st.text(max_size=20)),
    "metadata.csv": st.one_of(
        st.sampled_from(["file_name,text", "text,file_name", '"', "file_name,text,file_name"]),
        ROWS.map(lambda row: as_table([row.values()]).partition("\n")[2]),
        st.text(max_size=20),
    ),
}
FILES = st.sampled_from(list(LINES)).flatmap(
    lambda name: st.tuples(st.just(name), st.lists(LINES[name], max_size=4).map("\n".join))
)


@settings(max_examples=200)
@given(FILES, st.sampled_from(["utf-8", "utf-8-sig", "latin-1"]))
@example(("metadata.jsonl", "[" * 100_000), "utf-8")
@example(("metadata.jsonl", '{"file_name": ' * 100_000), "utf-8")
@example(("metadata.jsonl", json.dumps({"file_name": "a.png", "text": "\ud800"})), "utf-8")
@example(("metadata.csv", f"file_name,text\na.png,{LONG}"), "utf-8")
def test_any_metadata_is_read_or_refused_in_one_sentence(pictured, file, encoding):
    path = pictured / file[0]
    path.write_bytes(file[1].encode(encoding, "ignore"))
    try:
        captions = trainer.read_metadata(path)
    except trainer.UserError as error:
        assert "\n" not in trainer.printable(str(error)) and len(str(error)) < 2000
        return
    assert set(captions) <= {pictured / "a.png"} and all(isinstance(text, str) for text in captions.values())


@given(st.one_of(st.binary(), st.text().map(str.encode), st.text().map(lambda text: text.encode("utf-8-sig"))))
@example(b"\xef\xbb\xbf")
@example("犬".encode("utf-16"))
def test_any_text_file_is_read_or_refused(pictured, content):
    path = pictured / "a.txt"
    path.write_bytes(content)
    try:
        assert trainer.read_text(path).encode() == content.removeprefix(b"\xef\xbb\xbf")
    except trainer.UserError as error:
        with pytest.raises(UnicodeDecodeError):
            content.decode()
        assert "is not in UTF-8" in str(error)


@given(st.binary(max_size=200))
def test_any_bytes_are_told_from_safetensors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    path.write_bytes(data)
    if trainer.tensor_names(path):
        length = struct.unpack("<Q", data[:8])[0]
        assert isinstance(json.loads(data[8 : 8 + length]), dict)


@pytest.mark.parametrize("kept", [0, 1, 17])
def test_a_whole_file_is_known_by_its_header(tmp_path, kept):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.zeros(kept, dtype=torch.float16)}, path, {"format": "pt"})
    assert trainer.tensor_names(path)
