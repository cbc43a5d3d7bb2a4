"""What tells the contents of files apart, and what a model does whose file was touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from models import Stored, make_transformer
from safetensors.torch import save_file
from weightstream.streaming import CheckpointChangedError, CheckpointFile
from weightstream.streaming.files.fingerprint import SAMPLE_BYTES, SAMPLED_TENSORS, places
from weightstream.streaming.files.header import Entry


def entry(begin: int, end: int) -> Entry:
    return Entry(str(begin), torch.uint8, (end - begin,), begin, end)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 200, 10_000])
def test_both_ends_and_the_middle_of_each_tensor_are_looked_at(size: int) -> None:
    entries = [entry(100 + number * size, 100 + (number + 1) * size) for number in range(5)]
    found = places([*entries, entry(7, 7)])
    assert found == sorted(found)
    assert all(0 < end - begin <= SAMPLE_BYTES for begin, end in found)
    for one in entries:
        seen = {at for begin, end in found for at in range(begin, end) if one.begin <= begin < one.end}
        assert {one.begin, (one.begin + one.end) // 2, one.end - 1} <= seen
        assert size > SAMPLE_BYTES or len(seen) == size


def test_of_many_tensors_some_are_looked_at_from_the_first_to_the_last() -> None:
    entries = [entry(number * 1000, (number + 1) * 1000) for number in range(5000)]
    found = places(entries)
    assert len(found) == 3 * SAMPLED_TENSORS
    assert found[0][0] == 0
    assert found[-1][1] == 5_000_000
    assert places([]) == []


def test_equal_files_have_equal_fingerprints_wherever_they_are(tmp_path: Path) -> None:
    weights = make_transformer(seed=1).state_dict()
    one, two, other = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "other"))
    save_file(weights, one)
    save_file(weights, two)
    os.utime(two, (5, 5))
    assert CheckpointFile(one).fingerprint == CheckpointFile(two).fingerprint
    for number, name in enumerate(weights):
        changed = {**weights, name: weights[name] + 1}
        save_file(changed, other)
        assert CheckpointFile(one).fingerprint != CheckpointFile(other).fingerprint, name
        if number > 5:
            break
    save_file(weights, other, {"step": "2"})
    assert CheckpointFile(one).fingerprint != CheckpointFile(other).fingerprint


def test_a_touched_file_is_read_anew_and_gives_the_same(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    for stamp in (1, 2, 3):
        stored.streamer.refresh()
        stored.streamer.load(stored.half)
        stored.check(3)
        stored.streamer.finish_building()
        os.utime(stored.path, (stamp, stamp))
        stored.check(2)
    stored.close()


def test_what_the_fingerprint_misses_is_not_mixed_with_what_was_there(tmp_path: Path) -> None:
    """One number in the middle of nowhere: the next load gives the file's model, with no copy of the one before."""
    stored = Stored(tmp_path)
    stored.streamer.load(stored.half)
    stored.check(3)
    stored.streamer.finish_building()
    for name in ("blocks.0.qkv.weight", "blocks.4.qkv.weight", "blocks.5.qkv.weight"):
        [file], place = stored.checkpoint.files, stored.checkpoint.files[0].entries[name]
        with stored.path.open("r+b") as target:
            target.seek(place.begin + SAMPLE_BYTES + 4)
            target.write(bytes(8))
        weight = dict(stored.plain.named_parameters())[name]
        with torch.no_grad():
            weight.view(-1)[SAMPLE_BYTES // 4 + 1 :][:2] = 0
    os.utime(stored.path, (9, 9))
    stored.expected = stored.plain(stored.x)
    stored.streamer.refresh()
    assert file.touches == 1
    stored.streamer.load(stored.half)
    stored.check(3)
    stored.close()


def test_other_contents_are_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    stored = Stored(tmp_path)
    stored.streamer.load(stored.half)
    stored.check(2)
    save_file(make_transformer(seed=9).state_dict(), tmp_path / "other.safetensors")
    stored.path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    os.utime(stored.path, (9, 9))
    with pytest.raises(CheckpointChangedError, match="was changed while it was in use"):
        stored.streamer.refresh()
    stored.close()
