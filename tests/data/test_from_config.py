"""What a config says of its data reaches the mixture and the batches."""

import numpy as np
import pytest

from dinojax import config as configs
from dinojax.data.from_config import open_data, phase_batches


def make(*parts, **crops):
    config = configs.base()
    config.batch_size = config.group = 8
    if parts:
        config.data.update({"source": "", "mixture": parts})
    else:
        config.data.source = "scenes:30?size=48"
    crops = {"sizes": ((32, 16, 0),), "locals": 3, **crops}
    phase = configs.phase("a", 5, crops=crops, masks={"ratio": (0, 1)})
    config.phases = (phase, configs.phase("b", 5, crops=crops, batch_size=16))
    return configs.resolve(config)


def test_a_single_source():
    config = make(global_scale=(0.5, 1), probabilities=(1,))
    first, second = (phase_batches(config, k, open_data(config), 16) for k in range(2))
    assert (first.batch, second.batch, first.seed, second.seed) == (8, 16, 0, 1_000_003)
    (crops,) = first.crops
    assert (crops.global_scale, crops.locals, crops.local_grid) == ((0.5, 1.0), 3, 0)
    assert first.masks.patch == 16 and first.masks.ratio == (0.0, 1.0)
    assert second.masks.ratio == (0.1, 0.5)
    assert first.at(0)["local_crops"].shape == (8, 3, 16, 16, 3)
    one, other = first.mixture.rows(first.seed, 0, 8), second.mixture.rows(second.seed, 0, 8)
    assert (one.record != other.record).any()  # every phase has an order of its own


def test_a_mixture():
    config = make(
        configs.component("one", "scenes:30?size=48", 3),
        configs.component("two", "scenes:20?size=48", 1, homogeneous=0.2),
    )
    data = open_data(config)
    assert data.expected() == pytest.approx({"one": 0.6, "two": 0.4})
    assert [len(part.source) for part in data.components] == [30, 20]
    assert configs.first_source(config) == "scenes:30?size=48"


def test_local_crops_inside_the_global_ones():
    config = make(local_from_global=True)
    batches = phase_batches(config, 0, open_data(config), 8)
    assert batches.crops[0].local_grid == 8
    batch = batches.at(0)
    window = batch["local_crops"][0, 0]
    places = [(y, x) for y in range(0, 17, 8) for x in range(0, 17, 8)]
    cuts = [batch["global_crops"][0, 0, y : y + 16, x : x + 16] for y, x in places]
    assert any(np.array_equal(window, cut) for cut in cuts)


def test_bands(tmp_path):
    """The model's number of bands is what the images must have, in the sentence and in a batch."""
    for number in range(9):
        np.save(tmp_path / f"{number}.npy", np.full((40, 40, 5), number, np.uint8))
    config = make()
    config.data.source = f"folder:{tmp_path}"
    with pytest.raises(ValueError, match=rf"{tmp_path}: .* 5 .*in_channels=5"):
        open_data(config)
    config.model.in_channels = 5
    batches = phase_batches(config, 0, open_data(config), 16)
    assert batches.at(0)["global_crops"].shape[-1] == 5


def test_sentences_name_the_component(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    good = configs.component("good", "scenes:30")
    with pytest.raises(ValueError, match="component 'bad': .* cannot be read"):
        open_data(make(good, configs.component("bad", f"folder:{tmp_path}")))
    with pytest.raises(ValueError, match="component 'bad': .*nowhere.* does not exist"):
        open_data(make(good, configs.component("bad", f"folder:{tmp_path}/nowhere")))
    config = make(good, configs.component("few", "scenes:7", 0, homogeneous=0.1))
    with pytest.raises(ValueError, match="'few' has 7 images, a homogeneous batch needs 8"):
        phase_batches(config, 0, open_data(config), 16)
