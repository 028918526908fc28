"""Preparation of evaluation images: sizes, order, batches; the extraction of features."""

import numpy as np
import pytest
from PIL import Image

from dinojax.data.decode import UnreadableImage
from dinojax.eval.common import Images, extract, fit


class Numbers:
    """Image i is filled with the value i."""

    def __init__(self, count=11, labelled=True):
        self.count, self.labelled, self.read = count, labelled, []

    def __len__(self):
        return self.count

    def labels(self):
        return np.arange(self.count) * 10 if self.labelled else None

    def encoded(self, i):
        raise NotImplementedError

    def image(self, index):
        self.read.append(index)
        return np.full((6, 9, 3), index, np.uint8)


def smooth(rows, cols, channels=3):
    y, x = np.mgrid[:rows, :cols]
    planes = [127 + 100 * np.sin(y / 9 + k) * np.cos(x / 11) for k in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def test_fit_is_shorter_side_then_centre_crop():
    image = smooth(60, 90)
    expected = Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit(image, 24, resize=32), np.asarray(expected)[4:28, 12:36])
    tall = fit(image.transpose(1, 0, 2), 24, resize=32)
    np.testing.assert_allclose(tall.transpose(1, 0, 2), fit(image, 24, resize=32), atol=1)


def test_fit_keeps_pixels_of_the_right_size():
    image = smooth(24, 24)
    np.testing.assert_array_equal(fit(image, 24), image)
    np.testing.assert_array_equal(fit(image, 10), fit(image, 10, resize=10))
    with pytest.raises(ValueError, match="resize 8 is below the crop size 10"):
        fit(image, 10, resize=8)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_fit_takes_any_number_of_channels(channels):
    image = smooth(40, 50, 6)
    out = fit(image[..., :channels], 20)
    assert out.shape == (20, 20, channels)
    np.testing.assert_array_equal(out[..., :1], fit(image[..., :3], 20)[..., :1])


def test_extract_keeps_the_order_and_drops_the_padding():
    features, labels = extract(lambda x: x[:, 0, 0, :2], Images(Numbers(), 6), batch=4)
    assert features.dtype == np.float32 and labels.dtype == np.int32
    np.testing.assert_array_equal(features[:, 0], np.arange(11))
    np.testing.assert_array_equal(labels, 10 * np.arange(11))


def test_second_evaluation_reads_nothing_again():
    source = Numbers()
    images = Images(source, 6)
    extract(lambda x: x[:, 0, 0], images, batch=4)
    extract(lambda x: x[:, 0, 0], images, batch=4)
    assert sorted(source.read) == list(range(11))


def test_unreadable_images_are_left_out():
    class Damaged(Numbers):
        def encoded(self, i):
            raise NotImplementedError

        def image(self, index):
            if index in (0, 5, 8, 9, 10):  # the last batch holds nothing else
                raise UnreadableImage(f"image {index} is truncated")
            return super().image(index)

    features, labels = extract(lambda x: x[:, 0, 0, :1], Images(Damaged(), 6), batch=4)
    np.testing.assert_array_equal(features[:, 0], [1, 2, 3, 4, 6, 7])
    np.testing.assert_array_equal(labels, [10, 20, 30, 40, 60, 70])


def test_limit_spreads_over_the_source():
    images = Images(Numbers(100), 6, limit=4)
    assert images.rows.tolist() == [0, 25, 50, 75]
    assert images.labels().tolist() == [0, 250, 500, 750]
    assert len(Images(Numbers(3), 6, limit=9)) == 3


def test_unusable_sources_end_in_a_sentence():
    with pytest.raises(ValueError, match="holds no images"):
        Images(Numbers(0), 6)
    with pytest.raises(ValueError, match="has no labels"):
        extract(lambda x: x[:, 0, 0], Images(Numbers(labelled=False), 6))
