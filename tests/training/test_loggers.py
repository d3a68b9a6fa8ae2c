"""Loggers of other libraries, each by its real library, without network; ``make test-loggers`` installs them."""

import json
import sqlite3
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from repr.config import compose
from repr.config_check import target_faults
from repr.fit import main
from repr.runs.folder import LOGGER_RUNS
from repr.training.loggers import Trackio, Wandb
from tests.test_fit import TINY

EXPECTED = {"train/loss": [0, 1, 2, 3], "val/zero_shot_top1": [1, 3]}  # name -> steps


def level_db_records(content: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB, whose blocks have 32 KiB and whose header has 7 bytes, as W&B writes it."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + size]
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
        place += 7 + size
        if -place % 2**15 < 7:  # too little for another
            place += -place % 2**15


def wandb_found(folder: Path) -> tuple[dict[str, list[int]], Any, set[str], int]:
    """Of what was kept to be sent later: name -> steps, the learning rate of the config, pictures, number of runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps: dict[str, list[int]] = {}
    config, pictures, runs = {}, set(), set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in level_db_records(path.read_bytes()):
            record = Record.FromString(data)
            runs |= {record.run.run_id} - {""}
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in row.keys() - {"trainer/global_step"}:
                steps.setdefault(name, []).append(row["trainer/global_step"])
            pictures |= {item.nested_key[0] for item in record.history.item if "filenames" in item.nested_key}
    return steps, config["optim.lr"], pictures, len(runs)


def mlflow_found(folder: Path) -> tuple[dict[str, list[int]], Any, set[str], int]:
    """As above, from the store in the run folder."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'repr'")
    runs = client.search_runs([experiment.experiment_id])
    run = runs[0]
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    steps = {name: [metric.step for metric in metrics] for name, metrics in history.items()}
    pictures = {path.path.partition("+")[0] for path in client.list_artifacts(run.info.run_id, "images")}
    return (
        steps,
        float(run.data.params["optim.lr"]),
        {Path(name).name.replace("~", "/") for name in pictures},
        len(runs),
    )


def trackio_found(folder: Path) -> tuple[dict[str, list[int]], Any, set[str], int]:
    """As above, from the store of the machine."""
    (database,) = folder.parent.glob("trackio/*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (config,) = connection.execute("select config from configs").fetchone()
    steps: dict[str, list[int]] = {}
    pictures = set()
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            steps.setdefault(name, []).append(step)
            pictures |= {name} if isinstance(value, dict) and "file_path" in value else set()
    return steps, json.loads(config)["optim.lr"], pictures, len({run for run, *_ in rows})


FOUND: dict[str, Callable[[Path], tuple[dict[str, list[int]], Any, set[str], int]]] = {
    "wandb": wandb_found, "mlflow": mlflow_found, "trackio": trackio_found
}  # fmt: skip


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("name", FOUND)
def test_a_logger_has_numbers_config_and_pictures_and_goes_on_in_its_run(name: str, offline: Path) -> None:
    """Here the run ends and is told to train on, which is what a stop and a resume are to a logger."""
    pytest.importorskip(name)
    more = ["trainer.log_every_n_steps=1", "callbacks.progress=null", "optim.lr=2e-3"]
    main([f"run_folder={offline}", *TINY, f"logger={name}", *more])
    first = json.loads((offline / LOGGER_RUNS).read_text())
    main([f"resume={offline}", "trainer.max_epochs=2"])
    assert json.loads((offline / LOGGER_RUNS).read_text()) == first
    assert first.keys() == {name}
    steps, lr, pictures, num_runs = FOUND[name](offline)
    assert {number: sorted(set(steps[number])) for number in EXPECTED} == EXPECTED
    assert (lr, num_runs) == (0.002, 1)
    assert "pictures/views" in pictures
    assert (offline / "metrics.csv").is_file()
    assert {path.name for path in offline.parent.iterdir()} <= {"run", "trackio"}  # nothing lies elsewhere


@pytest.mark.parametrize("name", FOUND)
def test_a_library_that_is_missing_is_one_error_of_the_check(name: str) -> None:
    cfg = compose([f"logger={name}"])
    assert cfg.logger.keys() == {name, "csv"}
    install = f"logger.{name}: {name} is not installed: pip install 'repr-pretrain[{name}]', or set another logger="
    values = OmegaConf.create({"logger": {name: {**cfg.logger[name], "folder": ".", "name": "demo"}}})
    assert target_faults(values) == ([] if find_spec(name) else [install])


@pytest.mark.parametrize("logger", [Wandb, Trackio])
def test_a_damaged_record_of_runs_is_one_error(logger: Any, tmp_path: Path) -> None:
    pytest.importorskip(logger.library)
    (tmp_path / LOGGER_RUNS).write_text("[")
    with pytest.raises(ValueError, match=rf"{LOGGER_RUNS} is damaged .*move it away"):
        logger(tmp_path, "project", "name")
