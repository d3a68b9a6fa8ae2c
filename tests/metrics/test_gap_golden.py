"""Numbers of the authors' own evaluator (arXiv 2405.18570), in float64 and float32.

The stored inputs have unit length to float32 only. The authors' functions take them as they are, ours
normalise them, which moves the float64 values by some 1e-8: hence 1e-7.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from repr.metrics.geometry import geometry
from repr.metrics.retrieval import retrieval

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "gap_metrics.npz"))
CASES = sorted({key.split(".")[0] for key in GOLDEN})
INPUTS = {"img", "txt", "temperature"}  # the temperature scales all similarities and moves no rank
GEOMETRY = {
    "image_uniformity_loss": "uniformity_image",
    "text_uniformity_loss": "uniformity_text",
    "total_uniformity_loss": "uniformity",
    "cross_encoder_uniform_loss": "cross_uniformity",
    "alignment": "alignment",
    "centroid_distance": "centroid_distance",
    "mean_cosine": "pair_cosine",
}
RECALL = {"i2t_recall_1_3_5_10": "i2t", "t2i_recall_1_3_5_10": "t2i"}


@pytest.fixture(params=CASES)
def case(request):
    return {key.split(".")[1]: value for key, value in GOLDEN.items() if key.startswith(f"{request.param}.")}


def test_every_golden_array_is_compared_or_an_input(case):
    assert set(case) == INPUTS | set(GEOMETRY) | set(RECALL)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_geometry(case, table, dtype, tolerance, scale):
    query = table(torch.tensor(case["img"], dtype=dtype) * scale, torch.tensor(case["txt"], dtype=dtype))
    values = geometry(query)
    ours = {golden: values[name] for golden, name in GEOMETRY.items()}
    theirs = {golden: float(case[golden]) for golden in GEOMETRY}
    assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_retrieval(case, table, dtype):
    query = table(torch.tensor(case["img"], dtype=dtype), torch.tensor(case["txt"], dtype=dtype))
    values = retrieval(query, ks=(1, 3, 5, 10))
    for golden, way in RECALL.items():
        assert [values[f"{way}_R@{k}"] for k in (1, 3, 5, 10)] == pytest.approx(case[golden].tolist(), abs=1e-12)
