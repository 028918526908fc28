"""From the config of a run to its data: what it mixes, and the batches of a phase.

Called by `train.py`, and by whoever wants to see what a run would see.
"""

from ml_collections import ConfigDict

from dinojax.data.masking import Masks
from dinojax.data.mixture import Mixture, open_mixture
from dinojax.data.multicrop import Crops
from dinojax.data.pipeline import Batches
from dinojax.data.sources import check_readable


def open_data(config: ConfigDict) -> Mixture:
    """The mixture of a resolved config; ValueError (one sentence) if it cannot be read."""
    data = config.data
    mixture = open_mixture(
        data.source,
        [(part.name, part.source, part.weight, part.homogeneous) for part in data.mixture],
    )
    for part in mixture.components:
        try:
            check_readable(part.source, config.model.in_channels)
        except ValueError as error:
            where = f"component {part.name!r}" if len(mixture.components) > 1 else data.source
            raise ValueError(f"{where}: {error}") from None
    return mixture


def phase_batches(
    config: ConfigDict,
    index: int,
    mixture: Mixture,
    patch: int,
    host: tuple[tuple[int, ...], int] = ((0,), 1),
) -> Batches:
    """The batches of phase `index` of a resolved config; `patch` is a token's side in pixels.

    Raises ValueError (one sentence) where sizes do not fit: batch, groups, hosts, images, crops.
    """
    phase = config.phases[index]
    crops = tuple(
        Crops(
            global_size=large,
            local_size=small,
            gram_size=anchor,
            locals=phase.crops.locals,
            global_scale=_pair(phase.crops.global_scale),
            local_scale=_pair(phase.crops.local_scale),
            no_distortions=phase.crops.gram_undistorted,
            local_grid=patch if phase.crops.local_from_global else 0,
        )
        for large, small, anchor in phase.crops.sizes
    )
    masks = Masks(
        patch=patch,
        probability=phase.masks.probability,
        ratio=_pair(phase.masks.ratio),
        circular_shift=phase.masks.circular_shift,
    )
    return Batches(
        mixture,
        crops,
        tuple(float(p) for p in phase.crops.probabilities),
        masks,
        batch=phase.batch_size,
        group=phase.group,
        seed=config.seed + 1_000_003 * index,  # every phase has an order of its own
        host=host,
        channels=config.model.in_channels,
    )


def _pair(values: tuple | list) -> tuple[float, float]:
    """Two numbers of a config as floats (flags make tuples of whole numbers too)."""
    low, high = values
    return float(low), float(high)
