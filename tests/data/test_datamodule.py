import tarfile

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from repr.data.datamodule import DataModule
from repr.data.datasets import draw_caption
from repr.data.epoch_order import EpochOrder
from repr.data.samplers import EpochBatchSampler, EvalBatchSampler
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.mixture import Mixture
from repr.data.sources.shards import Shards
from repr.data.sources.source import picture_hashes, reduced
from repr.data.sources.table import Table
from repr.data.views import Purpose, View, crop_views, draw, evaluation_view, stream
from repr.data.workers import Loader
from repr.seeds import permute, sample_seed, uniform

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:The dirpath has changed")


def flat(batch):
    """Every tensor of a batch by name."""
    views = {f"view{position}": view for position, view in enumerate(batch.get("views", ()))}
    return {key: value for key, value in batch.items() if key != "views"} | views


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key


def draw_captions(source, seed, index):
    draws = uniform(stream(seed, Purpose.CAPTION), 1)[:, 0].tolist()
    return [draw_caption(source, row, number) for row, number in zip(index.tolist(), draws, strict=True)]


def two_epochs(loader):
    batches = []
    for epoch in (0, 1):
        loader.batch_sampler.sampler.set_epoch(epoch)
        batches += [flat(batch) for batch in loader]
    return batches


@pytest.fixture(scope="module")
def emoji():
    views = {
        "large": View(size=24, scale=(0.3, 1), flip=0.5, brightness=0.4, hue=0.1),
        "small": View(size=12, scale=(0.1, 0.3), count=2, flip=0.5, blur_prob=0.5),
    }
    return DataModule(
        train=Emoji("train", captions=["caption", "keywords"]), eval={"val": Emoji("val")}, views=views, batch_size=12,
        eval_batch_size=12, image_size=24, seed=3, mean=(0.5,) * 3, std=(0.5,) * 3, bank_size=50,
        tokenizer=lambda texts: torch.tensor([[len(text), sum(map(ord, text))] for text in texts]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected_batches(emoji):
    """Three batches of two epochs each, in this process, by one rank."""
    dataset = emoji.train_dataloader().dataset
    return two_epochs(
        DataLoader(dataset, batch_sampler=EpochBatchSampler(EpochOrder([(40, 1.0)], 3), 12), collate_fn=dict)
    )


@pytest.mark.parametrize(("name", "values"), [("mean", 0.5), ("mean", [1, 2]), ("std", [0, 0, 0]), ("std", "abc")])
def test_a_mean_or_deviation_that_is_not_of_three_channels_is_refused(name, values):
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3} | {name: values}
    with pytest.raises(ValueError, match=rf"data\.{name}=.*; set it to three numbers"):
        DataModule(
            train=Emoji("val"), eval=None, views={"main": View(size=8, scale=(0.5, 1))}, batch_size=12,
            eval_batch_size=12, image_size=8, seed=0, **options,
        )  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_global_batch_is_the_same_for_all_workers_and_ranks(emoji, expected_batches, num_workers, world_size):
    loader = emoji.train_dataloader()
    ranks = []
    for rank in range(world_size):
        sampler = EpochBatchSampler(EpochOrder([(40, 1.0)], 3), 12, rank=rank, world_size=world_size)
        options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
        ranks.append(two_epochs(Loader(loader.dataset, batch_sampler=sampler, **options)))
    assert len(expected_batches) == 6
    for parts, expected in zip(zip(*ranks, strict=True), expected_batches, strict=True):
        assert_equal({key: torch.cat([part[key] for part in parts]) for key in expected}, expected)


def test_a_batch_can_be_drawn_again_by_hand(make_datamodule):
    datamodule = make_datamodule(num_workers=2)
    loader = datamodule.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(4)
    batch = list(loader)[2]
    index = permute(torch.arange(31), 31, 5, 4, -1)[12:18]
    seed = sample_seed(5, 4, index)
    crops, colour = draw(seed, datamodule.views)
    views, boxes = crop_views([datamodule.train.image(row) for row in index.tolist()], crops, datamodule.views)
    text = datamodule.tokenizer(draw_captions(datamodule.train, seed, index))
    label = index[:, None] % 2  # 'even' is before 'odd'
    expected = {
        "index": index,
        "seed": seed,
        "picture": torch.from_numpy(picture_hashes(datamodule.train, index.tolist())),
        "views": views,
        "boxes": boxes,
        "colour": colour,
        "text": text,
        "label": label,
    }
    assert_equal(flat(batch), flat(expected))
    assert [view.shape for view in views] == [(6, 3, 16, 16), (6, 3, 8, 8)]
    assert (boxes.shape, colour.shape) == ((6, 2, 4), (6, 2, 8))


def test_epochs_differ(make_datamodule):
    batches = two_epochs(make_datamodule(train=make_datamodule().train, batch_size=31).train_dataloader())
    first, second = ({key: value[batch["index"].argsort()] for key, value in batch.items()} for batch in batches)
    assert torch.equal(first["index"], second["index"])
    assert not torch.equal(batches[0]["index"], batches[1]["index"])
    for key in ("seed", "boxes", "colour", "view0", "view1", "text"):
        same = (first[key].flatten(1) if first[key].ndim > 1 else first[key][:, None]) == second[key].reshape(31, -1)
        assert same.all(dim=1).sum() < 25, key


def test_captions_are_drawn_evenly(noise):
    index = torch.arange(2000)
    drawn = draw_captions(noise(2000), sample_seed(0, 0, index), index)
    assert sum(text.startswith("picture") for text in drawn) == pytest.approx(1000, abs=100)


def test_labels_have_one_vocabulary_over_all_sets(make_datamodule, noise):
    train, val = noise(12), noise(4)
    train.attributes = {"colour": ["red", "", "blue"] * 4, "parity": ["even", "odd"] * 6}
    val.attributes = {"colour": ["green", "blue", "", "red"]}
    datamodule = make_datamodule(train=train, eval={"val": val})
    assert datamodule.attributes == {"colour": ["blue", "green", "red"], "parity": ["even", "odd"]}
    bank, val_loader = datamodule.val_dataloader()
    assert torch.cat([batch["label"] for batch in bank])[:3].tolist() == [[2, 0], [-1, 1], [0, 0]]
    assert torch.cat([batch["label"] for batch in val_loader]).tolist() == [[1, -1], [0, -1], [-1, -1], [2, -1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_loaders(make_datamodule, num_workers):
    datamodule = make_datamodule(num_workers=num_workers, bank_size=10)
    loaders = datamodule.val_dataloader()
    assert datamodule.eval_names == ["bank", "val", "other"]
    tables = [[flat(batch) for batch in loader] for loader in loaders]
    assert [len(table) for table in tables] == [3, 3, 1]
    index = torch.cat([batch["index"] for batch in tables[0]])
    assert index.tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    batch = tables[0][1]
    assert batch.keys() == {"index", "image", "text", "label"}
    assert batch["image"].dtype == torch.uint8
    assert torch.equal(batch["image"][2], evaluation_view(datamodule.train.image(18), 12))
    assert torch.equal(batch["text"][2], datamodule.tokenizer(["picture 18"])[0])
    assert batch["label"].tolist() == [[0], [1], [0], [1]]


def test_evaluation_ranks_give_every_row(make_datamodule):
    dataset = make_datamodule().val_dataloader()[1].dataset
    ranks = [
        DataLoader(dataset, batch_sampler=EvalBatchSampler(10, 8, rank=r, world_size=4), collate_fn=dict)
        for r in range(4)
    ]
    index = [row for parts in zip(*ranks, strict=True) for part in parts for row in part["index"].tolist()]
    assert list(dict.fromkeys(index)) == list(range(10))
    assert len(index) == 12


def test_without_tokenizer_eval_sets_or_labels(make_datamodule, noise):
    train = noise(8)
    train.attributes = {}
    datamodule = make_datamodule(train=train, eval={}, tokenizer=None)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.keys() == {"index", "seed", "picture", "views", "boxes", "colour"}
    assert datamodule.eval_names == datamodule.val_dataloader() == []


def test_an_evaluation_set_need_not_have_captions(make_datamodule, noise):
    silent = noise(4)
    silent.captions = lambda index: []
    _, loader = make_datamodule(eval={"silent": silent}).val_dataloader()
    assert "text" not in next(iter(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 32}, "batch of 32 but only 31"),
        ({"eval_batch_size": 0}, "data.eval_batch_size=0"),
        ({"bank_size": 0}, "data.bank_size=0; set it to 1 or more"),
        ({"decode": "fast"}, "data.decode='fast'; set it to exact, or to scaled"),
        ({"views": {}}, "at least one view"),
        ({"train": Emoji("val", captions=[])}, "data.train offers no captions"),
    ],
)
def test_errors_at_construction(make_datamodule, options, message):
    with pytest.raises(ValueError, match=message):
        make_datamodule(**options)


@pytest.mark.parametrize("name", ["bank", "train"])
def test_the_training_set_keeps_its_names(make_datamodule, noise, name):
    with pytest.raises(ValueError, match=f"'{name}' is the name of .* rename the set"):
        make_datamodule(eval={name: noise(4)})


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "a\0b", ".", "..", "", "a\nb"])
def test_names_that_cannot_be_those_of_files_are_refused(name, make_datamodule, noise):
    with pytest.raises(ValueError, match=r"^data\.eval: '.*' cannot be the name of a file; rename the set"):
        make_datamodule(eval={name: noise(4)})


def test_a_row_without_caption_is_named(make_datamodule, noise):
    train = noise(31)
    train.captions = lambda index: ["text"] if index == 0 else []
    with pytest.raises(ValueError, match=r"noise-\d+: no caption"):
        list(make_datamodule(train=train).train_dataloader())


def test_device_half_runs_after_the_transfer(make_datamodule):
    datamodule = make_datamodule()

    def transferred(batch):
        return datamodule.on_after_batch_transfer(
            datamodule.transfer_batch_to_device(batch, torch.device("cpu"), 0), dataloader_idx=0
        )

    batch = next(iter(datamodule.train_dataloader()))
    colour = batch["colour"].clone()
    ours = transferred(batch)
    assert [view.dtype for view in ours["views"]] == [torch.float32] * 2
    assert torch.equal(ours["colour"], colour)
    again = transferred(ours)
    assert all(torch.equal(a, b) for a, b in zip(again["views"], ours["views"], strict=True))
    image = transferred(next(iter(datamodule.val_dataloader()[0])))["image"]
    pixels = evaluation_view(datamodule.train.image(0), 12) / 255
    expected = (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    torch.testing.assert_close(image[0], expected)
    batch["boxes"] = batch["boxes"].bfloat16()
    with pytest.raises(ValueError, match="bf16-mixed"):
        transferred(batch)


def test_loaders_leave_the_global_generator_alone(make_datamodule):
    datamodule = make_datamodule(num_workers=1)
    before = torch.get_rng_state()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader()[1])
    assert torch.equal(before, torch.get_rng_state())


class Seen(LightningModule):
    """Keeps the epoch, rows, seeds and pixels of every training batch, and what it was evaluated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        pixels = [view.mean().item() for view in batch["views"]]
        self.batches.append((self.current_epoch, batch["index"].tolist(), batch["seed"].tolist(), pixels))
        return self.weight * 0 + self.weight

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((dataloader_idx, batch["image"].dtype, batch["index"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(datamodule, folder, *, checkpoint=None, every=1, **options):
    module = Seen()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)],
        **{"max_epochs": 3, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
    return module


@pytest.mark.filterwarnings("error:.*your dataloader is not resumable")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(make_datamodule, tmp_path, num_workers, accumulate):
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}  # 5 batches an epoch
    whole = fit(make_datamodule(num_workers=num_workers), tmp_path, **options).batches
    assert [epoch for epoch, *_ in whole] == [0] * 5 + [1] * 5 + [2] * 5
    steps = -(-5 // accumulate)
    for step in (1, steps, steps + 1, 2 * steps - 1):
        epoch, within = divmod(step, steps)
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["DataModule"]
        assert (state["epoch"], state["batch"]) == (epoch, within * accumulate)
        resumed = fit(
            make_datamodule(num_workers=num_workers),
            tmp_path / "again",
            checkpoint=tmp_path / f"step={step}.ckpt",
            **options,
        )
        assert resumed.batches == whole[5 * epoch + within * accumulate :], step


def test_validation_in_fit_runs_over_all_sets(make_datamodule, tmp_path):
    module = fit(make_datamodule(bank_size=4), tmp_path, limit_train_batches=2, check_val_every_n_epoch=3)
    assert [loader for loader, *_ in module.evaluated] == [0, 1, 1, 1, 2]
    assert {dtype for _, dtype, _ in module.evaluated} == {torch.float32}
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["DataModule"]
    assert (state["epoch"], state["batch"]) == (1, 1)  # two batches an epoch, as limited


@pytest.mark.parametrize(
    ("data", "trainer", "words"),
    [
        ({"batch_size": 3}, {}, r"data\.batch_size was 6 and is 3"),
        ({"seed": 6}, {}, "seed was 5 and is 6"),
        ({}, {"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches was 1 and is 2"),
        ({}, {"limit_train_batches": 3}, r"trainer\.limit_train_batches was 1\.0 and is 3"),
        ({"train": 30}, {}, r"training set's parts was \[\[31, 31\]\] and is \[\[30, 30\]\]"),
    ],
)
def test_a_position_counted_in_other_batches_is_refused(make_datamodule, noise, tmp_path, data, trainer, words):
    options = {"limit_val_batches": 0, "max_epochs": 1}
    fit(make_datamodule(), tmp_path, **options)
    data = {name: noise(value) if name == "train" else value for name, value in data.items()}
    with pytest.raises(ValueError, match=f"cannot resume: .*{words}"):
        fit(make_datamodule(**data), tmp_path, checkpoint=tmp_path / "step=2.ckpt", **{**options, **trainer})


def test_a_position_without_its_options_is_still_read(make_datamodule):
    datamodule = make_datamodule()
    datamodule.load_state_dict({"epoch": 1, "batch": 3})
    sampler = datamodule.train_dataloader().batch_sampler
    assert (sampler.epoch, sampler.start) == (1, 3)


class Kept(Seen):
    """Writes what its rank saw."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        bad = self.trainer.datamodule.state_dict()["bad"]
        torch.save([self.batches, self.evaluated, bad], self.folder / f"rank{self.global_rank}.pt")


def test_two_processes_take_their_rank_from_the_trainer_and_count_together(make_datamodule, noise, tmp_path):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(
        devices=2, strategy="ddp_fork", max_epochs=2, use_distributed_sampler=False, num_sanity_val_steps=0, **options
    )
    order = [permute(torch.arange(31), 31, 5, epoch, -1) for epoch in (0, 1)]
    damaged = [int(order[0][0]), int(order[0][3])]  # the first rows of both ranks

    class Damaged(noise):
        def image(self, index):
            if index in damaged:
                raise OSError(f"row {index} is damaged")
            return super().image(index)

    trainer.fit(Kept(tmp_path), datamodule=make_datamodule(train=Damaged(31), max_bad_fraction=0.1))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    index = [a[1] + b[1] for a, b in zip(one[0], two[0], strict=True)]
    order = [rows.tolist() * 2 for rows in order]
    expected = [[next(row for row in rows[p::6] if row not in damaged) for p in range(30)] for rows in order]
    assert index == [epoch[p : p + 6] for epoch in expected for p in range(0, 30, 6)]
    told = {row: f"row {row} is damaged" for row in sorted(damaged)}
    assert one[2] == two[2] == {"train": told}
    evaluated = [row for a, b in zip(one[1], two[1], strict=True) if a[0] == 2 for row in a[2] + b[2]]
    assert evaluated == [0, 1, 2, 2] * 2


def test_decoding_at_a_scale_moves_no_box_and_depends_on_no_worker(make_datamodule, tmp_path):
    """Large JPEGs from every kind of file, and a source that knows nothing of scales."""
    names, captions = [f"{row}.jpg" for row in range(8)], [f"picture {row}" for row in range(8)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row, name in enumerate(names):
            Image.linear_gradient("L").resize((320, 240 + row)).convert("RGB").save(tmp_path / name, quality=90)
            (tmp_path / f"{row}.txt").write_text(captions[row])
            archive.add(tmp_path / name, name)
            archive.add(tmp_path / f"{row}.txt", f"{row}.txt")
    lines = [",".join(cells) for cells in zip(names, captions, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    sources = [
        Folder(tmp_path, captions=True),
        Table(tmp_path / "t.csv", captions=["caption"]),
        Shards(str(tmp_path / "a.tar"), captions=["txt"]),
        Emoji("val"),
    ]
    reductions = [reduced(source, 3, lambda width, height: 4).size for source in sources]
    assert reductions == [(80, 61)] * 3 + [(64, 64)]

    class Turned(Folder):
        """Knows nothing of scales, unlike what it inherits from."""

        def image(self, index):
            return super().image(index).transpose(Image.Transpose.ROTATE_90)

    assert reduced(Turned(tmp_path), 3, lambda width, height: 4).size == (243, 320)
    batches = []
    for decode, num_workers in (("exact", 0), ("scaled", 0), ("scaled", 2)):
        options = {"train": Mixture(sources[:3]), "decode": decode, "num_workers": num_workers}
        batches.append(flat(next(iter(make_datamodule(**options).train_dataloader()))))
    exact, scaled, in_workers = batches
    assert_equal(in_workers, scaled)
    assert torch.equal(scaled["boxes"], exact["boxes"])
    for view in ("view0", "view1"):
        assert not torch.equal(scaled[view], exact[view])
        assert (scaled[view].int() - exact[view]).abs().float().mean() < 2
