"""What is advised where a step does not fit: always what comes first and really fits."""

from dinojax.planning import figures
from dinojax.planning.advice import advise, cheaper
from dinojax.planning.topology import parse


def test_advice_is_the_first_that_fits(experiment):
    """ViT-L without rematerialisation on eight H100s, by the estimate."""
    config = experiment("pretrain_vitl", model__remat="none")
    topology = parse("gpu:h100x8")
    worst = figures.measure(config, 0, (224, 96, 0), topology)
    assert not worst.fits
    advice = advise(config, worst, topology)
    assert advice.change == "--config.model.remat=full" and advice.step.fits
    # Of one card the state fits, the activations of 2,048 images do not.
    config, one = experiment("pretrain_vitl"), parse("gpu:h100")
    advice = advise(config, figures.measure(config, 0, (224, 96, 0), one), one)
    assert advice.change.startswith("--config.microbatches=")
    assert advice.step.fits and advice.step.memory.total > advice.step.memory.limit / 2


def test_advice_where_the_state_is_too_large(experiment):
    """A 7B state fits no two GPUs, whatever is done about activations: more of them."""
    config, topology = experiment("vit7b", batch_size=64), parse("gpu:h100x1")
    worst = figures.measure(config, 0, (256, 112, 0), topology)
    advice = advise(config, worst, topology)
    assert advice.change.startswith("--topology gpu:h100x")
    assert advice.step.memory.total <= advice.step.memory.limit


def test_advice_compiles_what_it_recommends(experiment):
    """The estimate only chooses what to compile; here nothing that is compiled ever fits."""
    config, topology = experiment("pretrain_vitl", model__remat="dots_no_batch"), parse("v5e:4x8")
    worst = figures.guess(config, 0, (224, 96, 0), topology)
    asked = []

    def measured(changed, index, crops, where):
        asked.append((changed.model.remat, changed.mesh.tensor, changed.microbatches))
        return worst._replace(memory=worst.memory._replace(total=2 * worst.memory.limit))

    assert advise(config, worst._replace(how="compiled"), topology, measured) is None
    # 32 groups on 32 chips: no micro-batches until pairs of chips share their images.
    assert asked == [("full", 1, 1), *[("full", 2, n) for n in (1, 2)]] + [
        ("full", 4, n) for n in (1, 2, 4)
    ]


def test_no_more_pieces_than_groups(experiment):
    config, topology = experiment("pretrain_vitl"), parse("v5e:4x4")
    changes = [change for change, *_ in cheaper(config, topology)]
    assert changes[0] == "--config.microbatches=2"  # 32 groups over 16 chips: two pieces at most
    # With every image on two chips there is room for twice as many.
    tensor = "--config.mesh.tensor="
    assert changes[1:4] == [
        f"{tensor}2",
        f"{tensor}2 --config.microbatches=2",
        f"{tensor}2 --config.microbatches=4",
    ]
    larger = [change for change in changes if change.startswith("--topology")]
    assert changes[-len(larger) :] == larger and larger[0] == "--topology v5e:4x8"
