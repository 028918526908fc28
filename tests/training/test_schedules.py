"""Schedules against arrays built the long way, and the check values of spec 6.3 and 11."""

import numpy as np
import pytest

from dinojax.training import schedules

VITL_LR = {"kind": "v1", "start": 0.0, "base": 1e-3, "end": 1e-6, "warmup": 12500}


def v2_array(start, peak, end, warmup, total, cosine=-1):
    n = total - warmup if cosine < 0 else cosine
    ramp = np.linspace(start, peak, warmup, endpoint=False)
    wave = end + (peak - end) * (1 + np.cos(np.linspace(0, np.pi, n))) / 2
    return np.concatenate([ramp, wave, np.full(total - warmup - n, end)])


def v1_array(start, base, end, warmup, total, trunc_extra=0.0):
    n = total - warmup
    wave = (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    if trunc_extra:
        wave = (1 + np.cos(np.linspace(0, np.pi, int((1 + trunc_extra) * n)))[:n]) / 2
        wave = (wave - wave[-1]) / (1 - wave[-1])
    return np.concatenate([np.linspace(start, base, warmup), end + (base - end) * wave])


@pytest.mark.parametrize(
    ("start", "peak", "end", "warmup", "total", "cosine"),
    [
        (0.0, 1.0, 0.1, 10, 50, -1),
        (0.1, 0.5, 0.2, 7, 40, 20),
        (0.0, 0.0, 2.0, 5, 30, 10),
        (0.0, 1.0, 0.5, 0, 12, 0),
        (0.0, 1.0, 0.5, 3, 12, 1),
        (0.3, 1.0, 0.5, 12, 12, -1),
    ],
)
def test_v2(start, peak, end, warmup, total, cosine):
    schedule = dict(kind="v2", start=start, peak=peak, end=end, warmup=warmup, cosine=cosine)
    want = v2_array(start, peak, end, warmup, total, cosine)
    got = schedules.values(schedule, np.arange(total), total)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert got.dtype == np.float64
    one_by_one = [schedules.value(schedule, i, total) for i in range(total)]
    np.testing.assert_array_equal(one_by_one, got)
    assert schedules.value(schedule, total + 3, total) == end


@pytest.mark.parametrize("trunc_extra", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("warmup", "total"), [(10, 50), (0, 30), (1, 20), (18, 20)])
def test_v1(warmup, total, trunc_extra):
    schedule = dict(kind="v1", start=0.2, base=1.0, end=0.1, warmup=warmup, trunc_extra=trunc_extra)
    want = v1_array(0.2, 1.0, 0.1, warmup, total, trunc_extra)
    got = schedules.values(schedule, np.arange(total), total)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert schedules.value(schedule, total, total) == 0.1


def test_spec_values_of_vitl():
    total = 125_000
    lr = schedules.scaled(VITL_LR, schedules.scale_lr("sqrt_1024", 2048))
    want = {
        1: 4.525845e-7,
        12499: 5.656854e-3,
        12500: 5.656854e-3,
        62500: 3.319992e-3,
        124999: 1.000001e-6,
    }
    for step, rate in want.items():
        assert schedules.value(lr, step, total) == pytest.approx(rate, rel=1e-6)
    decay = dict(kind="v1", start=0.0, base=0.04, end=0.4, warmup=0)
    momentum = dict(kind="v1", start=0.0, base=0.992, end=1.0, warmup=0)
    temperature = dict(kind="v1_linear", start=0.04, end=0.07, warmup=37500)
    assert schedules.value(decay, 62500, total) == pytest.approx(0.22)
    assert schedules.value(momentum, 62500, total) == pytest.approx(0.996)
    assert schedules.value(temperature, 12500, total) == pytest.approx(0.0400 + 0.0100003, abs=5e-8)
    assert schedules.value(temperature, 37499, total) == pytest.approx(0.07)
    assert schedules.value(temperature, 124999, total) == 0.07
    last = schedules.last_layer_values(lr, 1250, np.array([0, 1249, 1250]), total)
    np.testing.assert_allclose(last, [0.0, 0.0, 5.657306e-4], rtol=1e-6)


def test_spec_values_of_7b():
    gram = dict(kind="v2", start=0.0, peak=0.0, end=2.0, warmup=1_000_000, cosine=1000)
    got = schedules.values(gram, np.array([1_000_000, 1_000_500, 1_000_999]), 1_200_000)
    np.testing.assert_allclose(got, [0.0, 1.0016, 2.0], atol=5e-5)
    high_res = dict(kind="v2", start=0.0, peak=0.0, end=1.25e-5, warmup=0, cosine=10_000)
    high_res = schedules.scaled(high_res, schedules.scale_lr("sqrt_1024", 2048))
    steps = np.arange(0, 30_000, 100)
    rates = schedules.values(high_res, steps, 30_000)
    assert np.all(np.diff(rates[steps < 10_000]) > 0)
    np.testing.assert_allclose(rates[steps >= 10_000], 7.0711e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("peak", "batch", "rule", "want"),
    [
        (1e-3, 2048, "sqrt_1024", 5.656854e-3),
        (5e-5, 4096, "sqrt_1024", 4.0e-4),
        (3e-5, 4096, "sqrt_1024", 2.4e-4),
        (5e-5, 1776, "sqrt_1024", 2.634e-4),
        (1e-3, 512, "linear_256", 2e-3),
        (1e-3, 512, "none", 1e-3),
    ],
)
def test_scaling_rules(peak, batch, rule, want):
    assert peak * schedules.scale_lr(rule, batch) == pytest.approx(want, rel=2e-4)


def test_v1_scales_its_peak_alone():
    assert schedules.scaled(VITL_LR, 3.0) == {**VITL_LR, "base": 3e-3, "trunc_extra": 0.0}
    v2 = dict(kind="v2", start=0.5, peak=1.0, end=2.0, warmup=0, cosine=0)
    assert schedules.scaled(v2, 3.0) == {**v2, "peak": 3.0, "end": 6.0}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="schedule kind 'v3'.*v2, v1"):
        schedules.value({"kind": "v3"}, 0, 1)
    with pytest.raises(ValueError, match="'warm'.*nearest: warmup"):
        schedules.value({**VITL_LR, "warm": 3}, 0, 1)
    with pytest.raises(ValueError, match="needs base"):
        schedules.value({"kind": "v1", "start": 0.0, "end": 1.0, "warmup": 3}, 0, 1)
    with pytest.raises(ValueError, match="'sqrt'.*sqrt_1024"):
        schedules.scale_lr("sqrt", 4)
