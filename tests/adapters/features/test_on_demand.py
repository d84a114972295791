"""Features that are encoded as they are needed, and those read ahead: the very numbers that the cache gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_encoder import FakeEncoder, expected, files, pictures

from adapters.data.image_ref import ImageRef
from adapters.features.cache import FeatureCache
from adapters.features.on_demand import FeaturesOnDemand
from adapters.features.reading import FeaturesReadAhead
from qformer.errors import UserError


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_they_are_those_of_the_cache_bit_for_bit(tmp_path: Path, together: int, scale: float) -> None:
    refs = pictures(*range(19), 3, 3)
    cache = FeatureCache(FakeEncoder(scale=scale), tmp_path, together=together)
    source = FeaturesOnDemand(cache)
    source.expect(refs[:5])
    once = source.load(refs)
    assert files(tmp_path) == []  # nothing is kept
    kept = cache.load(refs)
    assert once.dtype == kept.dtype and torch.equal(once, kept)


def test_each_is_encoded_once_a_call_and_again_in_the_next(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    source = FeaturesOnDemand(FeatureCache(encoder, tmp_path))
    source.load(pictures(1, 2, 1))
    assert encoder.pictures == 2
    source.load(pictures(1))
    assert encoder.pictures == 3


def test_no_more_pictures_are_decoded_ahead_than_allowed(tmp_path: Path) -> None:
    seen = []

    class Noting(FakeEncoder):
        def preprocess(self, images):  # type: ignore[no-untyped-def]
            seen.append(len(images))
            return super().preprocess(images)

    source = FeaturesOnDemand(FeatureCache(Noting(), tmp_path), ahead=3)
    source.expect(pictures(*range(10)))
    source.expect(pictures(*range(10)))
    source._pool.shutdown(wait=True)
    assert len(seen) == 3


def test_a_bad_picture_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    bad = ImageRef("bad.png", data=b"not a picture", where="data.jsonl row 3 (line 3)")
    source = FeaturesOnDemand(FeatureCache(FakeEncoder(), tmp_path))
    source.expect([bad])
    with pytest.raises(UserError, match=r"^data\.jsonl row 3 \(line 3\): image 'bad\.png' is not a picture"):
        source.load([bad])


def test_batches_are_read_ahead_in_any_order_and_others_beside_them(tmp_path: Path) -> None:
    cache = FeatureCache(FakeEncoder(), tmp_path)
    cache.fill(pictures(*range(9)))
    source = FeaturesReadAhead(cache, ahead=2)
    for batch in (pictures(0, 1), pictures(2, 3), pictures(4, 5), pictures(2, 3)):
        source.expect(batch)
    assert len(source._reading) == 2
    for batch in (pictures(2, 3), pictures(8), pictures(0, 1), pictures(4, 5)):
        assert torch.equal(source.load(batch), expected(batch))
    assert not source._reading
