"""The input path of an experiment, stage by stage; `launch/bench.py --data` prints what it finds.

One thread first goes through the stages of the host one by one (read, decode, crop, batch), then
all threads work as in training, then the device takes batches over and changes their colours.
"""

import platform
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax import sharding
from dinojax.data import from_config, photometric, pipeline
from dinojax.data.decode import EncodedSource, UnreadableImage, decode
from dinojax.data.multicrop import views

HOST, DEVICE = ("read", "decode", "crop", "batch"), ("transfer", "photometric")


def measure(config: ConfigDict, index: int, seconds: float) -> dict[str, Any]:
    """Figures of the data of phase `index`: about `seconds` for each of its stages."""
    config = configs.resolve(config)
    configs.validate(config)
    mixture = from_config.open_data(config)
    batches = from_config.phase_batches(config, index, mixture, configs.patch_stride(config))
    alone = host_stages(batches, seconds)
    # Threads share caches and memory, so all together do less than each alone would.
    threads = dict(workers=config.data.workers, threads=config.data.threads or None)
    with batches.stream(prefetch=config.data.prefetch, **threads) as stream:
        batch = next(stream)
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds or not done:
            batch = next(stream)
            done += batches.batch
    together = done / spent
    device = device_stages(config, batches, batch, seconds)
    rates = {"host, all threads": together, **{name: 1e3 / device[name] for name in DEVICE}}
    slowest = min(rates, key=rates.__getitem__)
    if slowest.startswith("host"):
        longest = max(HOST, key=alone.__getitem__)
        share = alone[longest] / sum(alone[name] for name in HOST)
        slowest = f"host: {longest} ({share:.0%} of a thread's time)"
    return {
        "milliseconds_per_image": {name: alone[name] for name in HOST} | device,
        "images_per_second_one_thread": 1e3 / sum(alone[name] for name in HOST),
        "images_per_second_host": together,
        "images_per_second_device": 1e3 / sum(device.values()),
        "bottleneck": slowest,
        "bytes_per_image": sum(a.nbytes for a in arrays(batch).values()) / batches.batch,
        "source": config.data.source,
        "crops": str(tuple(config.phases[index].crops.sizes[0])),
        "threads": config.data.threads or pipeline.cores(),
        "workers": config.data.workers,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
    }


def host_stages(batches: pipeline.Batches, seconds: float) -> dict[str, float]:
    """Milliseconds an image in one thread: `read`, `decode`, `crop`, and `batch`, all the rest.

    A source that makes its images (`scenes`) has no bytes to read: all of that is `decode`.
    """
    batches.at(0)  # opens files, fills caches
    spent: Counter[str] = Counter()
    seen, step = 0, 0
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end or not seen:
        rows = batches.mixture.rows(batches.seed, step, batches.batch)
        crops = batches.crops[batches.triple(step)]
        for component, record in zip(rows.component.tolist(), rows.record.tolist()):
            source = batches.mixture.components[component].source
            started = time.perf_counter()
            try:
                if isinstance(source, EncodedSource):
                    data = source.encoded(record)
                    spent["read"] += time.perf_counter() - started
                    started = time.perf_counter()
                    image = decode(data, "", source.reading)
                else:
                    image = source.image(record)
            except UnreadableImage:
                continue
            decoded = time.perf_counter()
            views(image, np.random.default_rng(record), crops)
            spent["crop"] += time.perf_counter() - decoded
            spent["decode"] += decoded - started
            seen += 1
        # The same once more as training does it; what is over is masks, order and copies.
        started = time.perf_counter()
        batches.at(step)
        spent["whole"] += time.perf_counter() - started
        step += 1
    found = {name: 1e3 * spent[name] / seen for name in (*HOST, "whole")}
    found["batch"] = max(0.0, found["whole"] - found["read"] - found["decode"] - found["crop"])
    return found


def device_stages(
    config: ConfigDict, batches: pipeline.Batches, batch: dict[str, Any], seconds: float
) -> dict[str, float]:
    """Milliseconds an image to reach the devices, and for flip, colour, blur and normalisation."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    policy = photometric.policy(config.augment, config.data)
    crops = batches.crops[batch["triple"]]
    colour = jax.jit(
        lambda arrays: photometric.views(arrays, policy, crops.no_distortions, crops.global_size)
    )
    found = {}
    host = arrays(batch)
    on_device = jax.block_until_ready(sharding.to_global(host, mesh))
    jax.block_until_ready(colour(on_device))
    for name, work in (
        ("transfer", lambda: sharding.to_global(host, mesh)),
        ("photometric", lambda: colour(on_device)),
    ):
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds or not done:
            jax.block_until_ready(work())
            done += batches.batch
        found[name] = 1e3 * spent / done
    return found


def arrays(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of a batch goes to the device."""
    return {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures as a table."""
    found = [f"{'stage':12} {'ms/image':>9} {'images/s':>9}"]
    for name, value in figures["milliseconds_per_image"].items():
        where = "one thread" if name in HOST else figures["device"]
        rate = f"{1e3 / value:9.0f}" if value >= 5e-4 else f"{'-':>9}"
        found.append(f"{name:12} {value:9.3f} {rate}  {where}")
    return [
        *found,
        f"host, {figures['workers'] or figures['threads']} "
        f"{'workers' if figures['workers'] else 'threads'}: "
        f"{figures['images_per_second_host']:.0f} images/s "
        f"({figures['images_per_second_one_thread']:.0f} by one thread alone)",
        f"{figures['bytes_per_image'] / 1e6:.2f} MB an image go to the device",
        f"bottleneck: {figures['bottleneck']}",
    ]
