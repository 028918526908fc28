"""From images to an embedding set that curation opens, and what happens when it is stopped."""

import jax
import numpy as np
import pytest

from data_curation.embed import embed
from data_curation.embeddings import open_embeddings
from data_curation.files import Stopped
from dinojax import backbone
from dinojax.data.sources import open_source
from dinojax.eval.common import fit

MODEL = {"name": "vit", "variant": "tiny", "width": 32, "depth": 2, "heads": 2, "patch_size": 8}
MODEL |= {"storage_tokens": 2, "layerscale": 1.0, "dtype": "float32"}
SPEC, SIZES = "scenes:30?size=20", {"size": 16, "batch": 8, "shard_rows": 12, "threads": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    params = backbone.build(MODEL).init(jax.random.key(0))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    data = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    backbone.save_weights(path, {"backbone": params}, {"model": MODEL, "data": data}, step=3)
    return str(path)


def test_what_is_written_is_an_embedding_set(weights, tmp_path):
    calls = []

    def stop():
        calls.append(1)
        return len(calls) == 4  # in the second shard

    with pytest.raises(Stopped, match="of 30 images are embedded"):
        embed(SPEC, weights, tmp_path, stop=stop, **SIZES)
    assert [path.name for path in tmp_path.glob("emb-*")] == ["emb-00000.parquet"]
    summary = embed(SPEC, weights, tmp_path, stop=lambda: False, **SIZES)
    assert (summary.computed, summary.rows) == (18, 30)
    x, source = open_embeddings(str(tmp_path), verify=True), open_source(SPEC)
    assert (len(x), x.dim, x.manifest["source"]) == (30, 32, SPEC)
    rows = np.array([29, 3, 12])
    assert x.ids(rows).to_pylist() == [source.name(row) for row in rows]
    table = x.metadata(rows)
    assert table["row"].to_pylist() == rows.tolist()
    assert table["label"].to_pylist() == [source.label(row) for row in rows]
    pixels = np.stack([fit(source.image(row), 16) for row in rows])
    expected = backbone.load(weights).features(pixels).cls
    np.testing.assert_allclose(x.take(rows), expected, rtol=2e-3, atol=1e-3)  # float16


def test_without_weights(tmp_path):
    with pytest.raises(ValueError, match="embed.weights is ''"):
        embed(SPEC, "", tmp_path)
    assert not list(tmp_path.iterdir())
