"""Pictures: what they show, where, and that writing one is safe."""

import numpy as np
import pytest
from PIL import Image

from dinojax import visualize
from dinojax.data.sources import open_source


@pytest.fixture(scope="module")
def scene():
    """Two images of 32 pixels, 4 x 4 patches: an object in the middle, ground around it."""
    rng = np.random.default_rng(0)
    kind = np.zeros((4, 4), int)
    kind[1:3, 1:3] = 1
    axes = rng.normal(size=(2, 24))
    features = axes[kind.reshape(-1)] + 0.05 * rng.normal(size=(2, 16, 24))
    images = np.repeat(np.repeat(kind, 8, 0), 8, 1)[None, :, :, None] * np.array([200, 90, 30])
    return np.repeat(images, 2, 0).astype(np.uint8), features.astype(np.float32), kind == 1


def test_first_component_is_the_objects_and_bright(scene):
    _, features, inside = scene
    projection = visualize.fit_pca(features, (4, 4))
    colours = projection.colours(features).reshape(2, 4, 4, 3)
    assert colours[:, inside, 0].min() > 200 and colours[:, ~inside, 0].max() < 60
    # Mirrored features are as good a basis: the picture must not turn dark.
    mirrored = visualize.fit_pca(-features, (4, 4)).colours(-features)
    np.testing.assert_allclose(mirrored[..., 0], colours.reshape(2, 16, 3)[..., 0], atol=1)


def test_components_equal_an_eigendecomposition():
    rng = np.random.default_rng(1)
    features = (rng.normal(size=(3, 20, 6)) * np.array([9, 5, 3, 1, 1, 1])).astype(np.float32)
    found = visualize.fit_pca(features, (4, 5)).components
    rows = features.reshape(60, 6).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    overlap = np.abs(found @ vectors[:, ::-1][:, :3])
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-6)


def test_outliers_do_not_wash_out_the_rest(scene):
    _, features, inside = scene
    features = np.concatenate([features] * 8)
    features[0, 0] *= 4
    colours = visualize.fit_pca(features, (4, 4)).colours(features)[..., 0]
    assert colours[:, inside.reshape(-1)].min() - np.median(colours[:, ~inside.reshape(-1)]) > 60


def test_one_projection_for_other_images(scene):
    images, features, _ = scene
    projection = visualize.fit_pca(features, (4, 4))
    both = visualize.pca_sheet(images, features, (4, 4))
    again = visualize.pca_sheet(images, features, (4, 4), projection)
    np.testing.assert_array_equal(both, again)


def test_fewer_than_three_directions():
    features = np.ones((1, 4, 2), np.float32)
    picture = visualize.pca_sheet(np.zeros((1, 8, 8, 1), np.uint8), features, (2, 2))
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3


def test_similarity_by_hand():
    features = np.array([[2, 0], [0, 3], [1, 1], [-4, 0]], np.float32)
    found = visualize.similarity(features, 0)
    np.testing.assert_allclose(found, [1, 0, 0.5**0.5, -1], atol=1e-6)


def test_similarity_sheet_marks_its_patch(scene):
    images, features, _ = scene
    sheet = visualize.similarity_sheet(images[:1], features[:1], (4, 4), patches=[6])
    side = (sheet.shape[0] - 16) // 1
    image = sheet[8 : 8 + side, 8 : 8 + side].astype(int)
    red = np.argwhere((image[..., 0] > 220) & (image[..., 1] < 40) & (image[..., 2] < 40))
    np.testing.assert_allclose(red.mean(0), [1.5 / 4 * side, 2.5 / 4 * side], atol=1.5)
    heat = sheet[8 : 8 + side, -8 - side : -8].reshape(4, side // 4, 4, side // 4, 3)[:, 2, :, 2]
    brightness = heat.sum(-1)
    assert brightness[1:3, 1:3].min() > brightness[0].max()
    with pytest.raises(ValueError, match="patch 16 is outside a grid of 4 x 4"):
        visualize.similarity_sheet(images[:1], features[:1], (4, 4), patches=[16])


def test_contact_sheet_puts_tiles_in_reading_order():
    tiles = [np.full((10, 14, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = visualize.contact_sheet(tiles, columns=2)
    assert sheet.shape == (2 * 18 + 8, 2 * 22 + 8, 3)
    assert [sheet[13, 15, 0], sheet[13, 37, 0], sheet[31, 15, 0]] == [10, 20, 30]
    assert sheet[31, 37, 0] == 255  # an empty place is paper
    with pytest.raises(ValueError, match="at least one picture"):
        visualize.contact_sheet([])


def test_grid_must_match(scene):
    with pytest.raises(ValueError, match="16 patch features do not fill a grid of 3 x 5"):
        visualize.pca_sheet(*scene[:2], (3, 5))


def test_fixed_images_are_the_same_every_time():
    source = open_source("scenes:20?size=32")
    one = visualize.fixed_images(source, 4, 32)
    assert one.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(one, visualize.fixed_images(source, 4, 32))
    np.testing.assert_array_equal(one[1], source.image(6))  # not 5: a stride of whole classes


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    path = visualize.save(picture, tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)

    def full_disk(self, where):
        where.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        visualize.save(255 - picture, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    assert list(path.parent.iterdir()) == [path]
