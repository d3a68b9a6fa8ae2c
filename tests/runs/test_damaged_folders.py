"""Files of run folders that were damaged, edited or written by an older version: a result, or one clear error."""

import itertools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from repr.cli import user_message
from repr.config import compose
from repr.config_check import check
from repr.evaluate.__main__ import main as evaluate
from repr.fit import _config, fit, main
from repr.report.__main__ import main as report
from repr.runs.folder import CONFIG, save_config
from tests.test_fit import TINY

OTHERS: tuple[Any, ...] = (None, "x", -1, 0.5, [], {}, [1, "x"], {"a": 1})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    save_config(compose([*TINY, f"run_folder={folder}"]), folder)
    return yaml.safe_load((folder / CONFIG).read_text())


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, child in node.items() if isinstance(node, dict) else ():
        yield (*path, key)
        yield from places(child, (*path, key))


@pytest.mark.slow
def test_a_key_is_removed_or_replaced(config: dict[str, Any], tmp_path: Path) -> None:
    """Every second key, since a check takes a third of a second."""
    faults, draw = [], random.Random(0)
    for path in itertools.islice(places(config), 0, None, 2):
        other = draw.choice(("removed", *OTHERS))
        edited = yaml.safe_load(yaml.safe_dump(config))
        node = edited
        for key in path[:-1]:
            node = node[key]
        if other == "removed":
            del node[path[-1]]
        else:
            node[path[-1]] = other
        (tmp_path / CONFIG).write_text(yaml.safe_dump(edited))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(_config([f"resume={tmp_path}"], None))
        except Exception as error:
            if user_message(error) is None:
                faults.append((".".join(path), other, repr(error)[:300]))
    assert not faults, "\n".join(map(str, faults))


def test_a_damaged_file_of_a_run_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(compose([*TINY, f"run_folder={folder}"]))
    evaluate([f"model={folder}", "eval=[geometry]", "trainer.accelerator=cpu"])
    files = [folder / "metrics.csv", folder / "results.json", next(folder.glob("evaluation/*/metrics.json"))]
    files += [next(folder.glob("exhibits/*.npz"))]
    for path in files:
        whole = path.read_bytes()
        for damaged in (b"\xff\xfe\x00", b"step,a\nx,y\n", b"[1]\n", whole[: len(whole) * 4 // 5] + b"\n", b"{{{\n"):
            path.write_bytes(damaged)
            with pytest.raises(SystemExit, match="is damaged"):
                report([str(folder), "--out", str(tmp_path / "page.html")])
            if path == files[0]:
                with pytest.raises(SystemExit, match="is damaged"):
                    main([f"resume={folder}", "trainer.max_epochs=2"])
                assert path.read_bytes() == damaged
        path.write_bytes(whole)
    assert not (tmp_path / "page.html").exists()
