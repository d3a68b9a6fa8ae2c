"""One result on any number of processes: every objective, whole and with its encoders in slices."""

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
from filelock import FileLock

from tests.objectives.conftest import OBJECTIVES
from tests.parity_cases import ONE, VARIANTS, Records, can_be_sliced, column, differences, relative

Groups = Callable[[str, bool], list[Records]]
# Here processes, slices and strategy vary together; docs/parity.md has every column for every objective.
# Each group starts its processes once, for all of its objectives.
SLICED = [variant for variant in VARIANTS if can_be_sliced(variant)]
WHOLE = [variant for variant in VARIANTS if not can_be_sliced(variant)]
GROUPS = {
    (ONE, False): [*VARIANTS],  # what the others are compared with
    (ONE, True): [variant for variant in SLICED if variant not in OBJECTIVES],
    ("3 DDP", False): [*VARIANTS],
    ("2 FSDP2", True): [variant for variant in SLICED if variant in OBJECTIVES],
    ("2 FSDP2", False): WHOLE,
}
CASES = [
    pytest.param(
        name,
        sliced,
        variant,
        marks=pytest.mark.slow,
        id=f"{name}, {'slices' if sliced else 'whole'}: {variant}",
    )
    for (name, sliced), variants in GROUPS.items()
    if (name, sliced) != (ONE, False)
    for variant in variants
]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    """What every process of a column has computed, whole or in slices; once for all processes of tests."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    @cache
    def group(name: str, sliced: bool) -> list[Records]:
        path = shared / f"parity, {name}, {'slices' if sliced else 'whole'}.pt"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                found = column(name, tmp_path_factory.mktemp("ranks"), GROUPS[name, sliced], sliced=sliced)
                torch.save(found, path)
        return torch.load(path, weights_only=True)

    return group


@pytest.mark.parametrize(("name", "sliced", "variant"), CASES)
def test_every_group_of_processes_gives_the_result_of_one(
    name: str, sliced: bool, variant: str, groups: Groups
) -> None:
    (one,), ranks = groups(ONE, False), groups(name, sliced)
    reference = one[variant]
    assert reference["update"].norm() > 1e-3
    for rank, record in enumerate(records[variant] for records in ranks):
        found = differences(record, reference)
        assert found["loss"] < 1e-6
        assert found["ratio"] == pytest.approx(1, abs=1e-6)
        assert found["cosine"] == pytest.approx(1, abs=1e-9)
        assert found["later"] < 1e-5
        assert found["update"] < 1e-5
        assert rank or relative(record["image"], reference["image"]) < 1e-5  # the first process collects features
        assert torch.equal(record["update"], ranks[0][variant]["update"])
        for key in (key for key in reference if key.startswith("buffer.")):  # running statistics, the queue
            torch.testing.assert_close(record[key], reference[key], rtol=1e-5, atol=1e-5)
