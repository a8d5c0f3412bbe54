"""Copies are found and look-alikes are not, and what is found does not depend on what stands beside it."""

import io
import pickle
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_digits, load_sample_image

from pipeline.errors import UsageError
from pipeline.pool.copies import candidates as copy_candidates
from pipeline.pool.copies.alignment import Pairs, similarity_of
from pipeline.pool.copies.candidates import TURNS, Thumbnails, turned
from pipeline.pool.copies.index import CopyIndex, Matches, default_threshold, descriptor
from pipeline.pool.copies.thumbnails import Window, luminance, thumbnails

BICUBIC = Image.Resampling.BICUBIC
Picture = Image.Image


def jpeg(image: Picture, quality: int = 80) -> Picture:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def shifted(image: Picture, right: int, down: int) -> Picture:
    """Black where nothing is."""
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))


def trimmed(image: Picture, left: int, top: int, right: int, bottom: int) -> Picture:
    return image.resize(image.size, BICUBIC, (left, top, image.width - right, image.height - bottom))


def boxed(image: Picture) -> Picture:
    image = image.copy()
    image.paste("white", (20, 18, 29, 27))
    return image


def noisy(image: Picture) -> Picture:
    noise = np.random.RandomState(0).normal(0, 6, (32, 32, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


KINDS: dict[str, Callable[[Picture], Picture]] = {
    "same": lambda im: im,
    "JPEG 40": lambda im: jpeg(im, 40),
    "shifted by 2": lambda im: jpeg(shifted(im, 2, 2)),
    "shifted by -1 and 3": lambda im: jpeg(shifted(im, -1, 3)),
    "brightened": lambda im: jpeg(ImageEnhance.Brightness(im).enhance(1.2)),
    "darkened": lambda im: jpeg(ImageEnhance.Brightness(im).enhance(0.8)),
    "grey": lambda im: jpeg(im.convert("L")),
    "trimmed by 2": lambda im: jpeg(trimmed(im, 2, 2, 2, 2)),
    "trimmed by 4 and 1": lambda im: jpeg(trimmed(im, 4, 0, 0, 1)),
    "turned by 3 degrees": lambda im: jpeg(im.rotate(3, BICUBIC)),
    "blurred": lambda im: jpeg(im.filter(ImageFilter.GaussianBlur(0.7))),
    "noisy": noisy,
    "framed": lambda im: jpeg(ImageOps.expand(im.crop((2, 2, 30, 30)), 2, "red")),
    "covered in part": lambda im: jpeg(boxed(im)),
    "inverted": ImageOps.invert,
    "grey, trimmed, darker": lambda im: jpeg(
        ImageEnhance.Brightness(trimmed(im, 2, 2, 2, 2)).enhance(0.8).convert("L")
    ),
}


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """About 250 distinct 32-pixel tiles of two photographs at half and whole size, those with some texture."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.fromarray(load_sample_image(name))
        for image in (photograph.reduce(2), photograph):
            pixels = np.asarray(image)
            rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
            cut = pixels[: rows * 32, : columns * 32].reshape(rows, 32, columns, 32, 3).swapaxes(1, 2)
            found.append(cut.reshape(-1, 32, 32, 3))
    every = np.concatenate(found)
    steps = np.abs(np.diff(every.mean(3), axis=2)).mean((1, 2))
    every = every[steps > 6]
    return every[np.random.RandomState(0).permutation(len(every))]


@pytest.fixture(scope="module")
def half(tiles: np.ndarray) -> int:
    return len(tiles) // 2


@pytest.fixture(scope="module")
def index(tiles: np.ndarray, half: int) -> CopyIndex:
    return CopyIndex(tiles[:half], [f"test/{at}" for at in range(half)])


def made(tiles: np.ndarray, kind: Callable[[Picture], Picture]) -> np.ndarray:
    return np.stack([np.asarray(kind(Image.fromarray(tile)).convert("RGB")) for tile in tiles])


def same(a: Matches, b: Matches) -> None:
    """Bit for bit."""
    for name in ("index", "similarity", "mirrored"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mirror", [False, True])
def test_copies_are_found(index, tiles, kind, mirror):
    count = 60
    images = made(tiles[:count], KINDS[kind])
    matches = index.find(np.ascontiguousarray(images[:, :, ::-1]) if mirror else images)
    right = (matches.index == np.arange(count)) & (matches.mirrored == mirror)
    assert np.mean(right & (matches.similarity >= default_threshold(32))) >= 0.96
    assert np.abs(matches.similarity).max() <= 1
    if kind == "same" and not mirror:
        assert (matches.similarity == 1).all()


def test_honest_images_are_not(index, tiles, half):
    similarity = index.find(tiles[half:]).similarity
    assert len(similarity) > 110
    assert np.mean(similarity >= default_threshold(32)) < 0.05


def test_pictures_turned_and_on_their_head(index, tiles):
    for turn, mirrored in ((lambda p: np.rot90(p, 1, (1, 2)), False), (lambda p: p[:, ::-1], True)):
        matches = index.find(np.ascontiguousarray(turn(tiles[:40])))
        assert (matches.index == np.arange(40)).mean() > 0.97
        assert (matches.mirrored == mirrored).mean() > 0.97
        assert (matches.similarity >= default_threshold(32)).mean() > 0.97


def test_nothing_depends_on_the_batch_or_the_threads(index, tiles, half):
    """A score file is the same whoever makes it: 1, 7 or all at a time, 1 to 4 threads."""
    copied = made(tiles[:40], KINDS["trimmed by 4 and 1"])
    images = np.concatenate([copied, made(tiles[40:60], KINDS["covered in part"]), tiles[half : half + 60]])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = index.find(images)
        for many, batch in ((1, 1), (2, 7), (4, 64), (3, len(images))):
            torch.set_num_threads(many)
            parts = [index.find(images[at : at + batch]) for at in range(0, len(images), batch)]
            fields = (np.concatenate([getattr(p, name) for p in parts]) for name in ("index", "similarity", "mirrored"))
            same(whole, Matches(*fields))
    finally:
        torch.set_num_threads(threads)


def test_a_pickled_index_finds_the_same_and_is_small(index, tiles, half):
    data = pickle.dumps(index)
    again = pickle.loads(data)
    assert again.names == index.names
    same(index.find(tiles[half - 20 : half + 20]), again.find(tiles[half - 20 : half + 20]))
    assert len(data) < half * 3100 + 250_000  # bytes; the rest are the centres of the lists


def test_large_images_are_not_kept(tiles):
    large = made(tiles[:12], lambda im: im.resize((200, 200), BICUBIC))
    index = CopyIndex(large, [str(at) for at in range(12)])
    assert len(pickle.dumps(index)) < 12 * 4000
    matches = index.find(made(tiles[:12], KINDS["trimmed by 2"]))  # and are compared with small ones
    assert matches.index.tolist() == list(range(12))
    assert (matches.similarity >= default_threshold(200)).all()


def test_flat_images_are_copies_of_nothing(tiles):
    flat = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 90, 255)])
    originals = np.concatenate([flat, tiles[:5]])
    matches = CopyIndex(originals, list("abcdefgh")).find(np.concatenate([flat, tiles[5:8]]))
    assert (matches.similarity[:3] == 0).all()
    assert (matches.similarity < default_threshold(32)).all()
    small = CopyIndex(originals[:, ::4, ::4], list("abcdefgh")).find(flat[:, :8, :8])
    assert (small.similarity == 0).all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_images_than_candidates(tiles, count):
    index = CopyIndex(tiles[:count], [str(at) for at in range(count)])
    matches = index.find(made(tiles[:8], KINDS["shifted by 2"]))
    assert matches.index[:count].tolist() == list(range(count))
    assert (matches.similarity[:count] >= 0.7).all()
    assert (matches.similarity[count:] < 0.7).all()
    assert (matches.index < count).all()


def test_of_equal_originals_the_first_is_named(tiles):
    originals = np.concatenate([tiles[:6]] * 4)
    matches = CopyIndex(originals, [str(at) for at in range(24)]).find(made(tiles[:6], KINDS["JPEG 40"]))
    assert matches.index.tolist() == list(range(6))


def test_digits_of_eight_pixels():
    """No detail there: correlation of the pixels, against numpy in float64."""
    digits = np.repeat((load_digits().images * 15.9).astype(np.uint8)[..., None], 3, axis=3)
    originals, honest = digits[:900], digits[900:]
    index = CopyIndex(originals, [str(at) for at in range(900)])
    similarity = index.find(honest).similarity
    assert np.mean(similarity >= default_threshold(8)) < 0.003

    def standard(images):
        flat = images[..., 0].reshape(len(images), -1).astype(np.float64)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    both = np.stack([standard(honest), standard(honest[:, :, ::-1])])  # (2, n, 64)
    expected = (both @ standard(originals).T).max((0, 2))
    np.testing.assert_allclose(similarity, expected, atol=6e-5)
    twice = CopyIndex(np.concatenate([originals[:50], originals[:50]]), [str(at) for at in range(100)])
    assert twice.find(originals[:50]).index.tolist() == list(range(50))  # of equal ones, the first
    copied = np.clip(originals[:100, :, ::-1] * 0.8 + 10, 0, 255).astype(np.uint8)
    matches = pickle.loads(pickle.dumps(index)).find(np.ascontiguousarray(copied))
    assert (matches.index == np.arange(100)).mean() > 0.98
    assert (matches.similarity >= default_threshold(8)).all()
    assert matches.mirrored.mean() > 0.9  # a 0 or an 8 may be like itself
    with pytest.raises(ValueError, match="images of 9 pixels, evaluation images of 8"):
        index.find(np.zeros((1, 9, 9, 3), np.uint8))


@pytest.mark.parametrize("size", [16, 24])
def test_sizes_between(tiles, size):
    small = made(tiles[:60], lambda im: im.resize((size, size), BICUBIC))
    index = CopyIndex(small[:30], [str(at) for at in range(30)])
    matches = index.find(made(small, lambda im: jpeg(im, 92)))
    assert (matches.index[:30] == np.arange(30)).all()
    assert np.mean(matches.similarity[:30] >= default_threshold(size)) >= 0.96
    assert np.mean(matches.similarity[30:] >= default_threshold(size)) <= 0.04


def test_luminance_against_torch(tiles):
    """Areas for larger images, straight lines between pixels for smaller; whole numbers, so within rounding."""
    for size in (16, 24, 32, 40, 45, 64, 100):
        images = made(tiles[:4], lambda im, size=size: im.resize((size, size), BICUBIC))
        grey = torch.from_numpy(images).float() @ torch.tensor([77.0, 150, 29]) / 256
        if size % 32 == 0 or size > 64:  # torch's areas are whole pixels
            expected = F.interpolate(grey[:, None], (32, 32), mode="area")[:, 0]
        else:
            expected = F.interpolate(grey[:, None], (32, 32), mode="bilinear")[:, 0]
        gap = np.abs(luminance(images) - expected.numpy())
        assert gap.max() <= 0.51 if size <= 32 or size == 64 else gap.mean() < 6


def test_thumbnails_of_a_turned_image(tiles):
    """Signs and order instead of turning the picture: the same whole numbers, within rounding."""
    grey = luminance(tiles[:5])
    queries, order, sign, sources = copy_candidates._questions()
    seen = thumbnails(grey, queries)
    assert np.array_equal(seen, np.rint(seen))
    at = 0
    for look in copy_candidates.LOOKS:
        for turn in look.turns:
            picture = turned(torch.from_numpy(grey).float(), torch.full((5,), turn)).to(torch.uint8).numpy()
            expected = thumbnails(picture, (look.query,))[:, 0]
            np.testing.assert_allclose(seen[:, sources[at]][:, order[at]] * sign[at], expected, atol=1)
            at += 1
    assert at == len(sources) == 18
    assert len(set(TURNS)) == 10


def test_a_window_shows_what_lies_there(tiles):
    """The window beside the centre of a picture is the centre of the picture moved."""
    grey = luminance(tiles[:5])
    moved = np.roll(grey, (-3, 2), (1, 2))
    beside = thumbnails(grey, (Window(-2, 3, 20, 20),))
    np.testing.assert_allclose(beside, thumbnails(moved, (Window(0, 0, 20, 20),)), atol=1)
    np.testing.assert_allclose(np.linalg.norm(beside, axis=2), 127, atol=2)
    assert not thumbnails(np.full((1, 32, 32), 77, np.uint8), copy_candidates.AROUND).any()


def test_the_search_in_lists_finds_what_a_full_one_finds(tiles, half, monkeypatch):
    monkeypatch.setattr(copy_candidates, "LISTED", 1000)
    grey = luminance(tiles[:half])
    copied = luminance(made(tiles[:half], KINDS["shifted by -1 and 3"]))
    lists = Thumbnails(grey)
    assert lists._indexes[0].ntotal > copy_candidates.LISTED > lists._indexes[1].ntotal
    monkeypatch.setattr(copy_candidates, "LISTED", 1 << 40)
    full = Thumbnails(grey)
    a, b = lists.candidates(copied, 1), full.candidates(copied, 1)
    assert (b.index[:, 0].numpy() == np.arange(half)).mean() > 0.97
    assert (a.index == b.index).double().mean() > 0.97
    sought = thumbnails(copied, (copy_candidates.INNER,))[:, 0]
    nearest = [thumbs._indexes[0].search(sought, 1)[1] for thumbs in (lists, full)]
    assert np.mean(nearest[0] == nearest[1]) > 0.97
    # scores are exact: whole numbers, equal to numpy's
    vectors = thumbnails(grey, copy_candidates.AROUND).reshape(-1, 48).astype(np.int64)
    query = thumbnails(copied[:9], (copy_candidates.INNER,))[:, 0]
    score, place = full._indexes[0].search(query, 4)
    exact = query.astype(np.int64) @ vectors.T
    np.testing.assert_array_equal(np.sort(exact, 1)[:, ::-1][:, :4], score)
    np.testing.assert_array_equal(np.take_along_axis(exact, place, 1), score)


def test_alignment_finds_a_known_map(tiles):
    """A picture seen through an affine map: hardly alike where it lies, alike once laid over."""
    grey = torch.from_numpy(luminance(tiles[:30])).float()
    maps = torch.tensor([[1.08, 0.03, 1.2], [-0.03, 1.05, -0.8]]).expand(30, 2, 3)
    units = maps * torch.tensor([1, 1, 1 / 16])
    seen = F.grid_sample(
        grey[:, None],
        F.affine_grid(units, [30, 1, 32, 32], align_corners=False),
        padding_mode="border",
        align_corners=False,
    )[:, 0]
    still = torch.eye(2, 3).expand(30, 2, 3)
    inverse = torch.linalg.inv(torch.cat([maps, torch.tensor([[[0, 0, 1.0]]]).expand(30, 1, 3)], 1))[:, :2]
    alike = similarity_of(Pairs(grey, seen, still))
    assert (alike > 0.85).double().mean() > 0.9
    assert (similarity_of(Pairs(grey, seen, inverse)) > 0.9).double().mean() > 0.9
    assert (similarity_of(Pairs(grey, seen.roll(1, 0), still)) < 0.6).double().mean() > 0.95
    torch.testing.assert_close(similarity_of(Pairs(grey, grey, still)), torch.ones(30))


def test_descriptor_is_the_mean_of_blocks(tiles):
    got = descriptor(tiles[:3])
    blocks = (tiles[:3] @ np.array([77, 150, 29]) / 256).reshape(3, 8, 4, 8, 4).mean((2, 4)).reshape(3, 64)
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got, blocks, atol=1.01)
    assert descriptor(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 64)


def test_thresholds_fall_with_size():
    sizes = (8, 16, 24, 32, 224)
    assert [round(default_threshold(size), 3) for size in sizes] == [0.99, 0.8, 0.75, 0.7, 0.7]


def test_errors(tiles, monkeypatch):
    with pytest.raises(ValueError, match="2 names for 3 images"):
        CopyIndex(tiles[:3], ["a", "b"])
    with pytest.raises(ValueError, match="no evaluation images"):
        CopyIndex(tiles[:0], [])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install faiss-cpu"):
        CopyIndex(tiles[:3], ["a", "b", "c"])
