"""Near-duplicates of the reference's rows: edges, components, what is kept and what is removed."""

import numpy as np
import vectors

from data_curation.dedup import relative_dedup, self_dedup


@vectors.files("curation/dedup")
def test_self_dedup(case):
    found = self_dedup(case["X"], int(case["k"]), float(case["threshold"]))
    np.testing.assert_array_equal(found.edges.rows, case["edges"])
    np.testing.assert_array_equal(found.component, case["component"])
    np.testing.assert_array_equal(found.kept, case["kept"])


@vectors.files("curation/dedup", sub=lambda case: case.matching(r"component_k\d+"))
def test_shorter_lists(case, sub):
    k = int(sub.removeprefix("component_k"))
    found = self_dedup(case["X"], k, float(case["threshold"]))
    np.testing.assert_array_equal(found.component, case[sub])


@vectors.files("curation/dedup")
def test_relative_dedup(case):
    kept = case["kept"]
    arguments = case["X"][kept], case["ref"], int(case["k"]), float(case["rel_threshold"])
    whole = relative_dedup(*arguments)
    np.testing.assert_array_equal(whole.component, case["rel_component"])
    removed = whole.removed["row"].to_numpy()
    np.testing.assert_array_equal(kept[removed], case["rel_removed_component"])
    np.testing.assert_array_equal(kept[whole.kept], case["rel_kept"])
    direct = relative_dedup(*arguments, mode="direct").removed["row"].to_numpy()
    np.testing.assert_array_equal(kept[direct], case["rel_removed_direct"])
