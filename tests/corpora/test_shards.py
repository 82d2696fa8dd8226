"""Shard folders, where another system than Linux would refuse what Linux allows."""

import os

import numpy as np

from corpora.shards import ShardWriter, read_done


def test_a_shard_takes_its_name_with_no_file_open(tmp_path, monkeypatch):
    rename, still_open = os.rename, []
    with ShardWriter(tmp_path / "shard", dict(text=np.uint8)) as shard:
        shard.write(dict(text=[np.arange(3, dtype=np.uint8)]), dict(content=np.zeros(1, np.uint64)))

        def looking(source, target):
            still_open.extend(name for name, file in shard.files.items() if not file.closed)
            rename(source, target)

        monkeypatch.setattr(os, "rename", looking)
        shard.finish(dict(fingerprint=1))
    assert still_open == [] and read_done(tmp_path / "shard") == dict(fingerprint=1)
    assert (tmp_path / "shard/text.bin").read_bytes() == b"\0\1\2"
