"""Multistage contrastive learning (MCL): runs in stages, clusters between them, one encoder of all.

Method: Zhang et al., 2024, arXiv 2402.11816. A contrastive run learns only what tells random negatives apart. In each
further stage all negatives of a sample come from its own cluster of the features learned before, which do not tell them
apart any more, so others must be learned. The final representation is that of all stages, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from repr.cli import is_first
from repr.config import ConfigError
from repr.config_check import check
from repr.data.cluster_order import ClusterOrder, describe
from repr.data.clusters import Clusters, Leftovers, Mode, keys_hash, read_arrays, save_clusters
from repr.distributed import gather_objects, on_first
from repr.evaluate.during_training import Evaluation
from repr.export.folders import export
from repr.export.options import STAGED
from repr.fit import Run, train
from repr.models.concat import Norm
from repr.procedures.features import cluster, extract
from repr.procedures.stage_table import stage_table, write_table
from repr.report.exhibits import save_clusters_shown, save_exhibits
from repr.report.page import write_report
from repr.runs.checkpoints import checkpoints
from repr.runs.folder import (
    CLUSTERS,
    EXPORT,
    JOINED,
    REPORT,
    RESULTS,
    STAGE,
    STAGES,
    Results,
    load_results,
    save_config,
    save_results,
    stage_folder,
)
from repr.runs.joined import load_joined
from repr.runs.stage_record import StageRecord, read_record, sha256
from repr.training.trainer import make_trainer, progress

SINGLE = {"_target_": "repr.fit.single", "_partial_": True}


@dataclass
class Multistage:
    """The procedure: ``num_stages`` ordinary runs in ``<run folder>/stage-<s>``, then the evaluation of all joined.

    A run that was killed goes on with ``resume=``: finished stages are skipped, the interrupted one continues. All
    processes must see the run folder. Each stage has a seed of its own for the order of samples and their views.

    Attributes:
        num_stages: how many, with stage 0, which is an ordinary run.
        clustering: config of an estimator like scikit-learn's, with ``fit_predict``; it is made anew for each stage,
            with the stage's seed for its ``random_state``, if it has one.
        cluster_by: features that the objective's ``predict_step`` gives: ``image``, ``text``, ...; of several, a
            cluster of their product is a cluster of each.
        mode: see :class:`repr.data.clusters.Clusters`.
        leftovers: see :class:`repr.data.clusters.Clusters`.
        warm_start: whether a stage starts from the weights of the one before, instead of those of ``init_from`` or the
            random ones of the run's seed.
        norm: see :func:`repr.models.concat.join`.
        export: ``open_clip``, ``timm`` or ``hf``: write all stages for that library, which checks them, to ``export/``.
        first: values of the config that differ in stage 0.
        later: values of the config that differ in the stages after it.
    """

    num_stages: int
    clustering: Mapping[str, Any]
    cluster_by: Sequence[str]
    mode: Mode
    leftovers: Leftovers
    warm_start: bool = False
    norm: Norm = "joined"
    export: str | None = None
    first: Mapping[str, Any] = field(default_factory=dict)
    later: Mapping[str, Any] = field(default_factory=dict)

    def config_faults(self, cfg: Any, objective: Any) -> Iterator[str]:
        """Refuse an objective whose negatives are not those of the batch, and options that do not fit."""
        flow = type(objective)
        negatives_fault = getattr(objective, "negatives_fault", lambda: "nothing is known: it is no Objective")
        if fault := negatives_fault():
            yield f"procedure=multistage needs negatives from the batch, and of {flow.__name__} {fault}"
        if self.num_stages < 1:
            yield f"procedure.num_stages={self.num_stages}; set it to 1 or more"
        if not self.cluster_by or isinstance(self.cluster_by, str):
            yield f"procedure.cluster_by={self.cluster_by}; set a list such as [image]"
        elif unknown := [name for name in self.cluster_by if name not in getattr(objective, "EMBEDDINGS", (name,))]:
            yield f"procedure.cluster_by names {unknown[0]}; {flow.__name__} gives {', '.join(objective.EMBEDDINGS)}"
        if self.norm not in ("joined", "each"):
            yield f"procedure.norm={self.norm}; set it to joined or each"
        if self.export not in (None, *STAGED):
            yield f"procedure.export={self.export}; set it to {', '.join(STAGED)} or null"
        try:
            Clusters(torch.zeros(0), self.mode, self.leftovers)
        except ValueError as error:
            yield f"procedure: {error}"
        data = cfg.data if OmegaConf.is_dict(cfg.get("data")) else {}
        if data.get("clusters"):
            yield "data.clusters is set by procedure=multistage: set it to null"
        if data.get("lanes"):
            yield "procedure=multistage takes batches from clusters, not from lanes of shards: set data.lanes=null"

    def __call__(self, cfg: DictConfig) -> dict[str, Results]:
        """Run all stages of a checked config, or go on with them, evaluate them joined, print and write the table.

        Returns the results by column of the table: ``stage-0``, ..., ``joined``.

        Raises:
            ConfigError: what the stages change makes a config with faults.
            ValueError: the data set cannot be clustered, or is not that of the run to resume.
        """
        for stage in range(min(self.num_stages, 2)):
            check(self.stage_config(cfg, stage))
        keys = keys_hash(instantiate(cfg.data.train, _convert_="all"))
        records = self._finished(cfg, keys) if cfg.resume else []
        joined_folder = Path(cfg.run_folder, JOINED)
        if len(records) == self.num_stages and self._is_reported(cfg):
            if is_first():
                print(f"{cfg.resume} has ended after {self.num_stages} stages, so there is nothing to do")
            joined: Any = {name: (one["value"], one["chance"]) for name, one in load_results(joined_folder).items()}
            return {stage_folder("", record.stage).name: record.results for record in records} | {JOINED: joined}
        if is_first():
            Path(joined_folder, RESULTS).unlink(missing_ok=True)  # of fewer stages
            save_config(cfg, cfg.run_folder)
        for stage in range(len(records), self.num_stages):
            records.append(self._run_stage(cfg, stage, keys))
        columns = {stage_folder("", record.stage).name: record.results for record in records}
        columns[JOINED], attributes, headline = self._evaluate_joined(cfg)
        if is_first():
            folder = Path(cfg.run_folder)
            save_config(cfg, folder / JOINED)
            save_results(columns[JOINED], folder / JOINED)
            write_table(folder / STAGES, columns)
            write_report([folder / column for column in columns], folder / REPORT)
            try:
                if self.export:
                    out = export(folder, folder / EXPORT, to=self.export, force=True, trust=True)  # of this run
                    print(f"exported for {self.export}, and verified by it: {out}", flush=True)
            finally:
                Console().print(stage_table(columns, attributes, headline))
        return columns

    def _finished(self, cfg: DictConfig, keys: str) -> list[StageRecord]:
        """The records of the stages before the first that is not done."""
        records: list[StageRecord] = []
        for stage in range(self.num_stages):
            folder = stage_folder(cfg.run_folder, stage)
            record = read_record(folder, verify=is_first())
            # The last stage of a run that is to have more now has no clusters yet.
            if record is None or (record.clusters_sha256 is None and stage + 1 < self.num_stages):
                break
            if record.keys != keys:
                raise ValueError(
                    f"{folder} was made with another training set than data.train gives now (its keys or "
                    "their order differ); restore the data set, or start a new run"
                )
            if record.clustering and record.clustering["how"] != self._how() and is_first():
                print(f"{folder} is finished and keeps its clusters; the new options of the procedure act after it")
            records.append(record)
        return records

    def _is_reported(self, cfg: DictConfig) -> bool:
        """Whether nothing is missing of what comes after the last stage."""
        results, report = Path(cfg.run_folder, JOINED, RESULTS), Path(cfg.run_folder, REPORT)
        if not results.is_file() or not report.is_file() or report.stat().st_mtime < results.stat().st_mtime:
            return False
        return not self.export or Path(cfg.run_folder, EXPORT).is_dir()

    def _how(self) -> dict[str, Any]:
        """What decides the clusters of a stage."""
        algorithm = OmegaConf.to_container(OmegaConf.create(dict(self.clustering)), resolve=True)
        return {"algorithm": algorithm, "by": list(self.cluster_by)}

    def stage_config(self, cfg: DictConfig, stage: int) -> DictConfig:
        """The config of a stage, which is an ordinary run with two inputs: ``init_from`` and ``data.clusters``.

        Raises:
            ConfigError: ``first`` or ``later`` name an option that does not exist.
        """
        stage_cfg = deepcopy(cfg)
        folder, before = stage_folder(cfg.run_folder, stage), stage_folder(cfg.run_folder, stage - 1)
        stage_cfg.procedure = SINGLE
        stage_cfg.run_folder = str(folder)
        stage_cfg.resume = str(folder) if cfg.resume and checkpoints(folder) else None
        changes = self.later if stage else self.first
        try:
            OmegaConf.set_struct(stage_cfg, True)
            OmegaConf.set_struct(stage_cfg.freeze, False)
            stage_cfg.merge_with(changes)
        except OmegaConfBaseException as error:
            option = "procedure.later" if stage else "procedure.first"
            raise ConfigError([f"{option}: {str(error).splitlines()[0]}"]) from error
        stage_cfg.data.seed = _seed(cfg, stage)
        if stage:
            stage_cfg.data.clusters = {
                "_target_": "repr.data.clusters.load_clusters",
                "path": str(before / CLUSTERS),
                "mode": self.mode,
                "leftovers": self.leftovers,
            }
            if self.warm_start:
                stage_cfg.init_from = str(before)
        return stage_cfg

    def _run_stage(self, cfg: DictConfig, stage: int, keys: str) -> StageRecord:
        """Train a stage, or go on with it, cluster its features, and write its record."""
        stage_cfg = self.stage_config(cfg, stage)
        if is_first():
            Path(stage_cfg.run_folder, STAGE).unlink(missing_ok=True)  # of an earlier run in this folder
            print(f"stage {stage} of {self.num_stages}: {stage_cfg.run_folder}", flush=True)
        run = train(stage_cfg)
        # Processes that Lightning has started choose a folder of their own; from here on they know each other.
        cfg.run_folder = gather_objects(str(cfg.run_folder))[0]
        last = stage + 1 == self.num_stages
        table = None if last else extract(run.objective, run.datamodule, stage_cfg, self.cluster_by)
        return on_first(lambda: self._close_stage(cfg, stage, keys, run, table))

    def _close_stage(
        self, cfg: DictConfig, stage: int, keys: str, run: Run, table: tuple[dict[str, np.ndarray], np.ndarray] | None
    ) -> StageRecord:
        """Cluster and write, on the first process."""
        folder, seed = stage_folder(cfg.run_folder, stage), _seed(cfg, stage)
        clustering, coverage = {}, {}
        if table is not None:
            features, read = table
            labels, centroids = cluster(features, read, self.clustering, seed)
            before = read_arrays(stage_folder(cfg.run_folder, stage - 1) / CLUSTERS) if stage else {}
            ids = np.stack([*before.get("ids", ()), labels])
            kept = [
                {name.removeprefix(prefix): value for name, value in before.items() if name.startswith(prefix)}
                for prefix in (f"centroids_{s}_" for s in range(stage))
            ]
            clusters = save_clusters(folder / CLUSTERS, ids, run.datamodule.train, [*kept, centroids])
            clusters = Clusters(clusters.ids, self.mode, self.leftovers, clusters.keys)
            coverage = ClusterOrder(clusters, self.stage_config(cfg, 1).data.batch_size, seed).coverage()
            sizes = np.bincount(labels[read]).tolist()
            clustering = {"how": self._how(), "samples_read": int(read.sum()), "sizes": sizes}
            print(f"stage {stage}: {describe(coverage)}", flush=True)
            save_clusters_shown(folder, labels, run.datamodule.train)
        checkpoint = checkpoints(folder)[0]
        record = StageRecord(
            stage=stage,
            seed=seed,
            keys=keys,
            checkpoint=str(checkpoint.relative_to(folder)),
            checkpoint_sha256=sha256(checkpoint),
            results=dict(run.results),
            clustering=clustering,
            clusters_sha256=sha256(folder / CLUSTERS) if clustering else None,
            coverage=coverage,
        )
        record.write(folder)
        return record

    def _evaluate_joined(self, cfg: DictConfig) -> tuple[Results, list[str], list[str]]:
        """Results of all stages joined, the labelled attributes, and the headline of the evaluation."""
        datamodule = instantiate(cfg.data)
        if not datamodule.eval_names:
            return {}, [], []
        callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]
        evaluations = [callback for callback in callbacks if isinstance(callback, Evaluation)]
        joined = load_joined(cfg.run_folder, num_stages=self.num_stages, norm=self.norm, trust=True)  # of this run
        make_trainer(cfg, [*evaluations, *progress(cfg)], []).validate(joined, datamodule, verbose=False)
        results = {name: value for evaluation in evaluations for name, value in evaluation.results.items()}
        if is_first():
            for evaluation in evaluations:
                sources = {"bank": datamodule.train, **datamodule.eval}
                save_exhibits(Path(cfg.run_folder, JOINED), evaluation.shown, sources)
        headline = [name for evaluation in evaluations for name in evaluation.headline]
        return results, list(datamodule.attributes), headline


def _seed(cfg: DictConfig, stage: int) -> int:
    return int(cfg.seed) + 1000 * stage
