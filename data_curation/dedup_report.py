"""What deduplication found, in numbers and examples: components, chains, how alike they are.

Called by `dedup.py` and `relative.py`; goes into report.json.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from data_curation.embeddings import EmbeddingSet

_LARGEST, _SHOWN = 20, 16  # components listed, and members of each


def components(
    x: EmbeddingSet, labels: Int64[np.ndarray, " n"], max_component: int
) -> dict[str, Any]:
    """How many rows are in components of which size, and the largest with ids of members.

    Args:
      labels: the smallest position of every position's component.
      max_component: a larger one makes a sentence among `warnings`.
    """
    sizes = np.bincount(labels, minlength=1)
    values, counts = np.unique(sizes[sizes > 0], return_counts=True)
    largest = np.argsort(-sizes, kind="stable")[:_LARGEST]
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], largest)
    listed = []
    for label, start in zip(largest[sizes[largest] > 1], starts):
        members = x.row_of(order[start : start + min(sizes[label], _SHOWN)])
        listed.append(
            {
                "component": int(x.row_of(np.array([label]))[0]),
                "size": int(sizes[label]),
                "ids": x.ids(members).to_pylist(),
            }
        )
    most, warnings = int(sizes.max()), []
    if most > max_component:
        warnings.append(
            f"the largest component has {most} rows, more than max_component = {max_component}: "
            f"chains may have joined what is not alike; raise the threshold."
        )
    return {
        "component_sizes": dict(zip(values.tolist(), counts.tolist())),
        "largest": listed,
        "warnings": warnings,
    }


def representatives(removed: pa.Table, threshold: float) -> dict[str, Any]:
    """How alike removed rows are to the row that stands for them: a chain's ends may not be.

    This is the diameter check of the data curation spec (section 7).
    """
    sims = removed.column("sim").to_numpy()
    return {
        "below_threshold": int((sims <= threshold).sum()),
        "lowest": float(sims.min()) if len(sims) else None,
        "median": float(np.median(sims)) if len(sims) else None,
    }
