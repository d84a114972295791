"""Training of the grounding head: what is shown is right, and a stopped run goes on as if it had not been stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_grounding import tiny_config, tiny_parts

from adapters.data.image_ref import ImageRef
from adapters.loading.grounding_head import PhraseEncoder, TowerMaps
from adapters.training.grounding import (
    GroundingSettings,
    GroundingTrainer,
    PhraseBoxes,
    _augmented,
    find_all,
    says_a_side,
    unions,
)
from adapters.training.grounding_maps import MapStore, encode_phrases
from qformer.errors import UserError
from qformer.grounding import GroundingHead

SETTINGS = GroundingSettings(epochs=3, pictures=2, phrases=2, warmup=1, save_every=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[TowerMaps, PhraseEncoder]:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageRef]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        picture = Image.new("RGB", (33, 33), "white")
        picture.paste((200, 30 * number, 60), (4 * number, 5, 4 * number + 12, 20))
        picture.save(path)
    return [ImageRef(path.name, path=path) for path in paths]


@pytest.fixture
def store(tmp_path: Path, parts: tuple[TowerMaps, PhraseEncoder], images: list[ImageRef]) -> MapStore:
    store = MapStore(tmp_path / "maps", parts[0], images)
    store.fill()
    return store


def rows_of(store: MapStore) -> list[PhraseBoxes]:
    return [
        PhraseBoxes(picture, text, torch.tensor([[0.1 * picture, 0.2, 0.1 * picture + 0.3, 0.6]]))
        for picture in range(len(store.images))
        for text in range(3)
    ]


def trainer(
    parts: tuple[TowerMaps, PhraseEncoder], store: MapStore, state: Path | None, settings: GroundingSettings = SETTINGS
) -> GroundingTrainer:
    torch.manual_seed(0)
    text = encode_phrases(parts[1], ["a square", "the red square", "the picture"])
    return GroundingTrainer(GroundingHead(tiny_config(*parts)), store, text, rows_of(store), settings, state)


def test_maps_are_kept_and_taken_up_again(
    tmp_path: Path, parts: tuple[TowerMaps, PhraseEncoder], images: list[ImageRef], store: MapStore
) -> None:
    told: list[int] = []
    again = MapStore(store.folder, parts[0], images)
    again.fill(lambda done, total: told.append(done))
    expected = parts[0](parts[0].encoder.preprocess([Image.open(images[2].path or "")]))

    assert told == []  # nothing was encoded twice
    for found, right in zip(again.load([2]), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-2, rtol=1e-2)  # float16, and another batch
    with pytest.raises(UserError, match="maps of other pictures"):
        MapStore(store.folder, parts[0], images[:3])


def test_a_stopped_run_goes_on_alike(tmp_path: Path, parts: tuple[TowerMaps, PhraseEncoder], store: MapStore) -> None:
    whole = trainer(parts, store, None)
    losses: list[float] = []
    whole.run(lambda step, steps, loss: losses.append(loss))

    class Stopped(Exception):
        pass

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        trainer(parts, store, tmp_path / "state.pt").run(stop)
    second = trainer(parts, store, tmp_path / "state.pt")
    assert second.step == 3  # the last that was saved
    second.run()

    assert len(losses) == 6
    for name, tensor in whole.head.state_dict().items():
        torch.testing.assert_close(second.head.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="other settings"):
        trainer(parts, store, tmp_path / "state.pt", GroundingSettings(epochs=2))


def test_all_rows_are_found_in_the_order_of_their_pictures(
    parts: tuple[TowerMaps, PhraseEncoder], store: MapStore
) -> None:
    run = trainer(parts, store, None)
    run.head.eval()
    asked = rows_of(store)[::-1]

    found = list(find_all(run.head, store, (run.hidden, run.mask), asked, pictures=3))

    assert [row.picture for row, _ in found] == sorted(row.picture for row in asked)
    assert all(one.boxes.shape == (1, 1, 4) for _, one in found)


def test_a_mirrored_picture_has_its_boxes_mirrored() -> None:
    maps = [torch.arange(16.0).view(1, 1, 4, 4)]
    row = PhraseBoxes(0, 0, torch.tensor([[0.0, 0.25, 0.25, 0.5]]))
    sided = PhraseBoxes(0, 1, torch.tensor([[0.0, 0.25, 0.25, 0.5]]), sided=True)
    settings = GroundingSettings(mirrored=1.0, zoomed=0.0)

    shown, kept = _augmented(maps, [[row, sided]], settings, torch.Generator().manual_seed(0))

    torch.testing.assert_close(shown[0], maps[0].flip(-1))
    ((place, one, boxes),) = kept  # the phrase that says left would be wrong
    assert (place, one) == (0, row)
    torch.testing.assert_close(boxes, torch.tensor([[0.75, 0.25, 1.0, 0.5]]))


def test_a_part_of_a_picture_has_its_boxes_moved() -> None:
    place = (torch.arange(8.0) + 0.5) / 8
    maps = [torch.stack((place.expand(8, 8), place[:, None].expand(8, 8)))[None]]  # x and y of each place
    inside = PhraseBoxes(0, 0, torch.tensor([[0.45, 0.45, 0.55, 0.55]]))
    settings = GroundingSettings(mirrored=0.0, zoomed=1.0, smallest=0.5)

    shown, kept = _augmented(maps, [[inside]], settings, torch.Generator().manual_seed(5))

    (_, _, boxes) = kept[0]
    left, right = shown[0][0, 0, 0, 0], shown[0][0, 0, 0, -1]  # x at the first and the last place that are shown
    side = (right - left) / (7 / 8)
    start = left - side / 16
    assert float(side) < 1
    torch.testing.assert_close(boxes[0, 0] * side + start, torch.tensor(0.45), atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes[0, 2] * side + start, torch.tensor(0.55), atol=1e-4, rtol=0)


def test_what_is_cut_away_is_not_asked_for() -> None:
    maps = [torch.zeros(1, 1, 4, 4)]
    corners = [PhraseBoxes(0, n, torch.tensor([[x, x, x + 0.02, x + 0.02]])) for n, x in enumerate((0.0, 0.98))]
    settings = GroundingSettings(mirrored=0.0, zoomed=1.0, smallest=0.5)

    for seed in range(5):
        _, kept = _augmented(maps, [corners], settings, torch.Generator().manual_seed(seed))
        assert len(kept) in (1, 2)  # one corner at most, or, if neither is to be seen, the whole picture
        assert all(bool(((boxes >= 0) & (boxes <= 1)).all()) for _, _, boxes in kept)


def test_sides_and_unions() -> None:
    assert says_a_side("the man on the Left") and not says_a_side("a leftover")
    boxes = [torch.tensor([[0.1, 0.5, 0.2, 0.6], [0.3, 0.2, 0.4, 0.9]])]
    torch.testing.assert_close(unions(boxes), torch.tensor([[0.1, 0.2, 0.4, 0.9]]))
