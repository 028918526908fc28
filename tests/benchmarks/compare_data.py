"""Our input path against torchvision's, in turn on one core: A B A B.

    python tests/benchmarks/compare_data.py --torch-python /path/to/python [--rounds 3] \
        [--seconds 4] [--images FOLDER] [--json FILE]

Both decode 500 x 375 JPEGs and make two 256-pixel and eight 112-pixel crops of each. Theirs does so
in three ways: `pil` as the reference does (Pillow pictures), `tensor` on uint8 tensors, both with
all augmentation (jitter, grey, blur, solarize, flip, normalise), and `geometry`, `tensor` without
it. Ours is the host's part of training, decode and crops; `all ours` adds the device's part, all
colour, compiled for the same core. Ratios are ours / theirs: above 1 ours is faster.
Without `--images` the JPEGs are noise with the spectrum of photographs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

HERE = Path(__file__).parent
CROPS = {"global_size": 256, "local_size": 112}
THEIRS = ("pil", "tensor", "geometry")


def make_images(folder: Path, count: int = 16) -> None:
    """JPEGs of noise whose amplitude falls with frequency as in photographs, about 85 kB each."""
    rows, columns = 375, 500
    y, x = np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None]
    falling = 1 / np.maximum(np.hypot(y, x), 1 / columns)
    for index in range(count):
        rng = np.random.default_rng(index)
        spectrum = falling[..., None] * np.exp(2j * np.pi * rng.random((*falling.shape, 3)))
        bands = np.fft.irfft2(spectrum, s=(rows, columns), axes=(0, 1))
        bands = 0.3 * bands + bands.mean(-1, keepdims=True)  # bands of photographs are alike
        pixels = 128 + 55 * bands / bands.std()
        quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
        cv2.imwrite(str(folder / f"{index:02d}.jpg"), pixels.clip(0, 255).astype(np.uint8), quality)


def ours(folder: str, seconds: float, colour: bool) -> dict[str, float]:
    """Milliseconds an image for decoding, for the crops and for both."""
    from dinojax.data.decode import decode
    from dinojax.data.multicrop import Crops, views

    cv2.setNumThreads(1)
    encoded = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    crops, done, spent = Crops(**CROPS), 0, {"decode": 0.0, "crops": 0.0}
    for warm in (True, False):
        end = time.perf_counter() + (0.5 if warm else seconds)
        done, spent = 0, {"decode": 0.0, "crops": 0.0}
        while time.perf_counter() < end:
            started = time.perf_counter()
            image = decode(encoded[done % len(encoded)], "image")
            decoded = time.perf_counter()
            views(image, np.random.default_rng(done), crops)
            spent["decode"] += decoded - started
            spent["crops"] += time.perf_counter() - decoded
            done += 1
    milliseconds = {name: 1e3 * value / done for name, value in spent.items()}
    if colour:
        milliseconds["crops"] += photometric_milliseconds(image, crops, seconds)
    return milliseconds | {"total": sum(milliseconds.values())}


def photometric_milliseconds(
    image: np.ndarray, crops: Any, seconds: float, batch: int = 8
) -> float:
    """Milliseconds an image for flip, colour, blur and normalisation, compiled, in batches."""
    import jax

    from dinojax.data import multicrop, photometric

    made = [multicrop.views(image, np.random.default_rng(k), crops) for k in range(batch)]
    arrays = {name: np.stack([one[name] for one in made]) for name in made[0]}
    arrays = jax.device_put(arrays | {"seeds": np.arange(batch, dtype=np.uint32)})
    distort = jax.jit(lambda batch: photometric.views(batch, photometric.Photometric()))
    jax.block_until_ready(distort(arrays))
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        jax.block_until_ready(distort(arrays))
        done += batch
    return 1e3 * spent / done


def run(command: list[str], core: int) -> dict[str, Any]:
    """A process on one core; its last line is JSON."""
    load = os.getloadavg()[0]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["taskset", "-c", str(core), *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return {"load": load, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a python that has torch and torchvision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--images", help="folder of JPEGs; default: made for the purpose")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("--colour", action="store_true", help="with --ours: colour too")
    parser.add_argument("--ours", metavar="FOLDER", help="only measure ours, in this process")
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(ours(options.ours, options.seconds, options.colour)))
        return
    if not options.torch_python:
        parser.error("--torch-python is needed: a python that has torch and torchvision")
    with tempfile.TemporaryDirectory() as made:
        folder = options.images or made
        if not options.images:
            make_images(Path(made))
        seconds = f"--seconds={options.seconds}"
        commands = {"ours": [sys.executable, __file__, f"--ours={folder}", seconds]}
        commands["all ours"] = [*commands["ours"], "--colour"]
        for way in THEIRS:
            script = [options.torch_python, str(HERE / "torch_data.py"), folder]
            commands[way] = [*script, f"--way={way}", seconds]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        print(f"{'run':9} {'load':>6} {'decode ms':>10} {'crops ms':>9} {'images/s':>9}")
        for _ in range(options.rounds):
            for name, command in commands.items():
                figures = run(command, options.core)
                runs[name].append(figures)
                print(
                    f"{name:9} {figures['load']:6.2f} {figures['decode']:10.2f} "
                    f"{figures['crops']:9.2f} {1e3 / figures['total']:9.0f}",
                    flush=True,
                )
    result: dict[str, Any] = {"runs": runs}
    for way in THEIRS:
        for name in ("ours", "all ours"):
            ratios = [b["total"] / a["total"] for a, b in zip(runs[name], runs[way], strict=True)]
            result[f"{name} / {way}"] = statistics.median(ratios)
            listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"images/s, {name} / {way}: {statistics.median(ratios):.2f}  ({listed})")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
