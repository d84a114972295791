"""The first stage: each objective against a computation of its own, and what each mask must hide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from qformer.attention import generation_mask, matching_mask
from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.feature_norm import FeatureNorm
from qformer.objectives import Heads, contrastive_loss, generation_loss, matching_loss, similarity
from qformer.representation import RepresentationModel, TextBatch

DEC = 1
CONFIG = BridgeConfig.preset("tiny", text_branch=True, dropout=0.0)


class Tower:
    width, num_tokens, grid, has_positions = 24, 9, (3, 3), False


def make_model() -> RepresentationModel:
    torch.manual_seed(0)
    bridge = QFormer(CONFIG)
    with torch.no_grad():  # fresh weights are so small that every pass looks alike
        for parameter in bridge.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    heads = Heads(CONFIG, 16)
    with torch.no_grad():
        heads.matching.weight.mul_(20)
    return RepresentationModel(FeatureNorm([Tower()]), bridge, heads, decode_id=DEC).eval()


def make_batch() -> tuple[Tensor, TextBatch, Tensor]:
    """Four pictures, the second with two captions, of unlike lengths."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 9, 24, generator=generator)
    lengths = [7, 5, 8, 4, 6]
    mask = torch.arange(8)[None, :] < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 61, (5, 8), generator=generator).masked_fill(~mask, 0)
    return features, TextBatch(ids, mask, torch.tensor([0, 1, 1, 2, 3])), torch.tensor([10, 11, 12, 13])


def test_contrastive_loss_from_separate_passes() -> None:
    model, (features, text, images) = make_model(), make_batch()
    queries = [model.bridge(model.feature_norm([features[i : i + 1]])).queries for i in range(4)]
    texts = [
        model.bridge(None, text_ids=text.ids[t : t + 1, : int(text.mask[t].sum())]).text for t in range(5)
    ]  # no padding at all
    scores = similarity(
        torch.cat([model.heads.image_embeddings(q) for q in queries]),
        torch.cat([model.heads.text_embeddings(t, torch.ones(t.shape[:2])) for t in texts]),
    )
    expected = contrastive_loss(scores / model.heads.temperature, images, images[text.images])
    found = model([features], text, images).contrastive
    assert torch.allclose(found, expected, atol=1e-5)


def test_generation_loss_from_one_pass_over_queries_and_text() -> None:
    model, (features, text, images) = make_model(), make_batch()
    logits, labels = [], []
    for t, image in enumerate(text.images.tolist()):
        length = int(text.mask[t].sum())
        ids = text.ids[t : t + 1, :length].clone()
        ids[:, 0] = DEC
        whole = model.bridge(
            model.feature_norm([features[image : image + 1]]),
            text_ids=ids,
            self_mask=generation_mask(CONFIG.num_queries, torch.ones(1, length)),
        )
        words = model.bridge.embeddings.words.weight
        logits.append(model.heads.word_logits(whole.text[0, :-1], words))
        labels.append(text.ids[t, 1:length])
    expected = generation_loss(torch.cat(logits), torch.cat(labels))
    assert torch.allclose(model([features], text, images).generation, expected, atol=1e-5)


def test_matching_loss_of_the_pairs_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (features, text, images) = make_model(), make_batch()
    draws = iter([torch.tensor([4, 0, 1, 2]), torch.tensor([1, 3, 0, 2])])  # wrong texts, then wrong pictures
    monkeypatch.setattr("qformer.representation.hard_negatives", lambda *_: next(draws))
    first = [0, 1, 3, 4]  # each picture's first text
    pairs = [(i, first[i], 1) for i in range(4)]
    pairs += [(wrong, first[i], 0) for i, wrong in enumerate([1, 3, 0, 2])]
    pairs += [(i, wrong, 0) for i, wrong in enumerate([4, 0, 1, 2])]
    logits = []
    for image, t, _ in pairs:
        length = int(text.mask[t].sum())
        seen = model.bridge(model.feature_norm([features[image : image + 1]]), text_ids=text.ids[t : t + 1, :length])
        logits.append(model.heads.matching(seen.queries).mean(dim=1))
    expected = matching_loss(torch.cat(logits), torch.tensor([match for *_, match in pairs]))
    assert torch.allclose(model([features], text, images).matching, expected, atol=1e-5)


def test_a_share_of_the_pictures_is_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """ITM and ITG of the first two pictures are those of a batch of these two, but for where negatives come from."""
    model, (features, text, images) = make_model(), make_batch()
    draws = iter([torch.tensor([2, 0]), torch.tensor([1, 0])] * 2)  # within the first two pictures' texts 0, 1, 2
    monkeypatch.setattr("qformer.representation.hard_negatives", lambda *_: next(draws))
    share = model([features], text, images, paired=2)
    few = TextBatch(text.ids[:3], text.mask[:3], text.images[:3])
    alone = model([features[:2]], few, images[:2])
    assert torch.allclose(share.matching, alone.matching, atol=1e-5)
    assert torch.allclose(share.generation, alone.generation, atol=1e-5)


def test_without_pairs_only_the_contrastive_loss_counts_and_every_weight_has_a_gradient() -> None:
    model, (features, text, images) = make_model(), make_batch()
    losses = model([features], text, images, paired=0)
    assert losses.total.item() == losses.contrastive.item() == model([features], text, images).contrastive.item()
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
    assert model.heads.matching.weight.grad.abs().max() == 0


def test_pictures_without_negatives_still_match_their_own_text() -> None:
    model, (features, text, _) = make_model(), make_batch()
    same = torch.tensor([5, 5, 5, 5])
    losses = model([features], text, same)
    seen = model.bridge.image_keys_values(model.feature_norm([features]))
    chosen = torch.tensor([0, 1, 3, 4])
    logits = model.match(seen, text.ids[chosen], text.mask[chosen])
    assert torch.allclose(losses.matching, matching_loss(logits, torch.ones(4, dtype=torch.long)), atol=1e-5)


def outputs(model: RepresentationModel, features: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What each objective's pass gives, one picture and one text."""
    queries = CONFIG.num_queries
    normed = model.feature_norm([features])
    alone = model.bridge(normed, return_keys_values=True)
    written = model.bridge(
        None, text_ids=ids, past=alone.keys_values, self_mask=generation_mask(queries, mask)[:, :, queries:]
    )
    together = model.bridge(normed, text_ids=ids, self_mask=matching_mask(queries, mask))
    read = model.bridge(None, text_ids=ids, text_mask=mask)
    return {"queries": alone.queries, "read": read.text, "written": written.text, "matched": together.queries}


@pytest.mark.parametrize("place", [1, 3, 5])
def test_masks_hide_what_must_not_be_seen(place: int) -> None:
    model, (features, text, _) = make_model(), make_batch()
    picture, ids, mask = features[:1], text.ids[:1], text.mask[:1]
    before = outputs(model, picture, ids, mask)
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + 7) % 50 + 3
    after = outputs(model, picture, changed, mask)
    assert torch.equal(before["queries"], after["queries"])  # ITC: queries see no text
    assert torch.equal(before["written"][:, :place], after["written"][:, :place])  # ITG: nothing before it sees a token
    for t in range(place, 7):
        assert not torch.allclose(before["written"][:, t], after["written"][:, t], atol=1e-4)  # all from it on do
    assert not torch.allclose(before["matched"], after["matched"], atol=1e-4)  # ITM: queries see every token
    assert not torch.allclose(before["read"][:, 0], after["read"][:, 0], atol=1e-4)


def test_padding_changes_nothing_and_pictures_only_what_sees_them() -> None:
    model, (features, text, _) = make_model(), make_batch()
    ids, mask = text.ids[:1], text.mask[:1]  # seven tokens of eight
    before = outputs(model, features[:1], ids, mask)
    padded = ids.clone()
    padded[0, 7] = 44
    after = outputs(model, features[:1], padded, mask)
    for name in ("queries", "matched"):
        assert torch.equal(before[name], after[name]), name
    for name in ("read", "written"):
        assert torch.equal(before[name][:, :7], after[name][:, :7]), name
    other = outputs(model, features[1:2], ids, mask)
    assert torch.equal(before["read"], other["read"])  # ITC: text sees no picture
    for name in ("queries", "written", "matched"):
        assert not torch.allclose(before[name], other[name], atol=1e-4), name


def test_every_weight_learns_from_one_step() -> None:
    model, (features, text, images) = make_model(), make_batch()
    model([features], text, images).total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # the last layer's text block ends in no pass but the caption's; positions beyond the texts are not used
    assert still == []


def test_what_retrieval_asks_equals_what_training_computed() -> None:
    model, (features, text, _) = make_model(), make_batch()
    embedded = model.encode_images([features])
    assert torch.allclose(
        embedded, model.heads.image_embeddings(model.bridge(model.feature_norm([features])).queries), atol=1e-6
    )
    odds = model.match_scores([features], text.ids, text.mask, text.images)
    seen = model.bridge.image_keys_values(model.feature_norm([features]))
    for t, image in enumerate(text.images.tolist()):
        one = [type(layer)(layer.keys[image : image + 1], layer.values[image : image + 1]) for layer in seen]
        length = int(text.mask[t].sum())
        logits = model.match(one, text.ids[t : t + 1, :length], text.mask[t : t + 1, :length])
        assert odds[t].item() == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-4)


def _process(rank: int, folder: str) -> None:
    """One of two processes: half of the batch each, gradients averaged as DDP would."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, (features, _, images), text = make_model(), make_batch(), unlike_texts()
    chosen = slice(2 * rank, 2 * rank + 2)
    half = TextBatch(text.ids[chosen], text.mask[chosen], torch.tensor([0, 1]))
    losses = model([features[chosen]], half, images[chosen], generator=torch.Generator().manual_seed(rank))
    (losses.contrastive + losses.generation).backward()
    result = {"contrastive": losses.contrastive.detach().reshape(1), "matching": losses.matching.detach().reshape(1)}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        result[f"grad.{name}"] = gradient / 2
    if rank == 0:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in result.items()}, f"{folder}/result.safetensors")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    mp.spawn(_process, args=(str(tmp_path),), nprocs=2)
    found = load_file(tmp_path / "result.safetensors")
    model, (features, _, images) = make_model(), make_batch()
    losses = model([features], unlike_texts(), images)
    (losses.contrastive + losses.generation).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[f"grad.{name}"], expected, atol=1e-5), name
    assert torch.isfinite(found["matching"]).all()


def next_picture(scores: Tensor, ids: Tensor, other_ids: Tensor, generator: object = None) -> Tensor:
    """In the place of the draw: each picture's negative is of the one after it, on whichever process that is."""
    wanted = 10 + (ids - 10 + 1) % 4
    found = other_ids[None, :] == wanted[:, None]
    assert found.any(dim=1).all()
    return found.long().argmax(dim=1)


def unlike_texts() -> TextBatch:
    """A caption a picture, of 7, 5, 4 and 6 tokens: two processes pad their halves to unlike widths."""
    _, text, _ = make_batch()
    rows = torch.tensor([0, 1, 3, 4])
    return TextBatch(text.ids[rows], text.mask[rows], torch.arange(4))


def _matching_process(rank: int, folder: str) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, (features, _, images), text = make_model(), make_batch(), unlike_texts()
    chosen = slice(2 * rank, 2 * rank + 2)
    width = int(text.mask[chosen].sum(dim=1).max())
    half = TextBatch(text.ids[chosen, :width], text.mask[chosen, :width], torch.tensor([0, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qformer.representation.hard_negatives", next_picture)
        losses = model([features[chosen]], half, images[chosen])
    losses.matching.backward()
    result = {"matching": losses.matching.detach().reshape(1)}
    result |= {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for value in result.values():
        dist.all_reduce(value)
    if rank == 0:
        save_file({name: (value / 2).contiguous() for name, value in result.items()}, f"{folder}/result.safetensors")
    dist.destroy_process_group()


def test_two_processes_match_the_pairs_that_one_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives of the other process are the pictures and texts that they are in one."""
    from safetensors.torch import load_file

    mp.spawn(_matching_process, args=(str(tmp_path),), nprocs=2)
    found = load_file(tmp_path / "result.safetensors")
    monkeypatch.setattr("qformer.representation.hard_negatives", next_picture)
    model, (features, _, images) = make_model(), make_batch()
    losses = model([features], unlike_texts(), images)
    losses.matching.backward()
    assert torch.allclose(found.pop("matching"), losses.matching.detach(), atol=1e-5)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name], expected, atol=1e-5), name
