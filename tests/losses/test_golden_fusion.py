"""ALBEF's own numbers: three losses, their gradients, queue and teacher over two steps, on one process and on two."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repr.distributed import all_reduce, rank
from repr.losses.captioning import masked_language
from repr.losses.distillation import soft_contrast
from repr.losses.exchange import GATHER, RING
from repr.models.embedding_queue import Queue
from repr.models.teacher import Teacher
from repr.objectives.negatives import negative_logits
from tests.golden import golden
from tests.losses.test_golden_teachers import close, leaf
from tests.parity_cases import in_processes

ALBEF = golden("albef")


def both(image: Tensor, text: Tensor, keys: tuple[Tensor, Tensor], queue: Tensor, **how: object) -> Tensor:
    of_images = soft_contrast(image, keys[1], keys[0], queue=queue[1], **how)
    return (of_images + soft_contrast(text, keys[0], keys[1], queue=queue[0], **how)) / 2


def newest_first(file: dict[str, np.ndarray], prefix: str, pointer: int, num: int) -> Tensor:
    """Their ring of columns, whose oldest ones the pointer shows, as rows of ours, of batches of ``num``: (2, Q, D)."""
    rows = torch.tensor(np.stack([file[f"{prefix}.{kind}_queue"].T for kind in ("image", "text")]))
    blocks = rows.roll(-pointer, 1).split(num, 1)
    return torch.cat(blocks[::-1], 1)


@pytest.mark.parametrize("case", ["a_alpha04", "b_alpha0_two_fusion", "dist2"])
def test_two_steps_of_contrast_queue_and_teacher(case: str) -> None:
    """A rank of the reference compares with its own rows and the queue, so each of the two is a process alone."""
    file = {key.removeprefix(f"{case}/"): ALBEF[key] for key in ALBEF if key.startswith(f"{case}/")}
    ranks = [".rank0", ".rank1"] if case == "dist2" else [""]
    num, momentum = int(file["cfg.B"]) * len(ranks), float(file["cfg.momentum"])
    queue = Queue(2, int(file["cfg.queue"]), int(file["cfg.embed"])).double()
    queue.rows.copy_(newest_first(file, "weight", file["weight.queue_ptr"].item(), num))
    queue.num_filled.fill_(queue.rows.shape[1])
    owner = nn.ModuleDict({"projection": nn.Linear(24, queue.rows.shape[2])})
    teacher = Teacher(momentum=momentum, projection=owner["projection"])
    teacher.projection.weight.data = torch.tensor(file["weight.vision_proj_m.weight"])
    student, temperature = file["weight.vision_proj.weight"], leaf(file["weight.temp"])
    for step in ("step1", "step2"):
        owner["projection"].weight.data = torch.tensor(student)
        teacher.follow(owner, 0, None)
        keys, slopes = [], []
        for name in ranks:
            aux = {
                part: leaf(file[f"{step}.aux.{part}{name}"])
                for part in ("image_raw", "text_raw", "image_raw_m", "text_raw_m")
            }
            ours = (aux["image_raw_m"], aux["text_raw_m"])
            how = {"temperature": temperature, "alpha": float(file[f"{step}.in.alpha{name}"])}
            for chunk in (None, 2):
                value = both(aux["image_raw"], aux["text_raw"], ours, queue.rows, chunk_size=chunk, **how)
                close(value, file[f"{step}.out.loss_ita{name}_f64"], value=1e-6)
                if step == "step1" and "grad_ita.temp" in file:
                    found = torch.autograd.grad(
                        value, [aux["image_raw"], aux["text_raw"], temperature], retain_graph=True
                    )
                    for grad, part in zip(found, ("aux.image_raw", "aux.text_raw", "temp"), strict=True):
                        close(grad, file[f"grad_ita.{part}"], grad=1e-5)
            slopes.append(torch.autograd.grad(value, temperature, retain_graph=True)[0])
            for weights, query, key in (("t2i", "text_raw", ours[0]), ("i2t", "image_raw", ours[1])):
                logits = negative_logits(aux[query], key, temperature=temperature).fill_diagonal_(-torch.inf)
                theirs = torch.tensor(file[f"{step}.aux.weights_{weights}{name}"])
                close(logits.softmax(1), (theirs / theirs.sum(1, keepdim=True)).numpy(), value=1e-5)
            keys.append(torch.stack([F.normalize(x.detach(), dim=1) for x in ours], 1))
        queue.push(torch.cat(keys))
        close(queue.rows, newest_first(file, f"{step}.after", file[f"{step}.after.queue_ptr"].item(), num).numpy())
        close(teacher.projection.weight, file[f"{step}.after.vision_proj_m.weight"])
        student = file[f"{step}.after.vision_proj.weight"]
        step_down = temperature - 0.01 * sum(slopes) / len(slopes)  # plain SGD, of which no temperature is stored
        temperature = leaf(file.get(f"{step}.after.temp_f64", step_down.detach().numpy()))


@pytest.mark.parametrize("case", ["a_alpha04", "b_alpha0_two_fusion"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_masked_language(case: str, chunk: int | None) -> None:
    """Their logits go through a head that changes nothing; the gradient of its bias is that of theirs."""
    labels = torch.tensor(ALBEF[f"{case}/step1.draw.mlm_labels"])
    logits, theirs = (
        torch.tensor(ALBEF[f"{case}/step1.aux.mlm_logits{part}"])[labels >= 0].double() for part in ("", "_m")
    )
    head, bias = torch.eye(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64, requires_grad=True)
    options = {"alpha": float(ALBEF[f"{case}/cfg.alpha"]), "teacher": (theirs, head, None), "chunk_size": chunk}
    value = masked_language(logits, head, labels[labels >= 0], bias=bias, **options)
    close(value, ALBEF[f"{case}/step1.out.loss_mlm_f64"])
    value.backward()
    close(bias.grad, ALBEF[f"{case}/grad_mlm.text_encoder.cls.predictions.bias"], grad=1e-5)


def naive(q: Tensor, k: Tensor, t: Tensor, queue: Tensor, temperature: Tensor, alpha: float) -> Tensor:
    q, k, t, queue = (F.normalize(x, dim=1) for x in (q, k, t, queue))
    columns = torch.cat([k, queue])
    soft = alpha * (t @ columns.T / temperature).softmax(1).detach()
    soft[:, : len(q)] += (1 - alpha) * torch.eye(len(q), dtype=q.dtype)
    return -(soft * (q @ columns.T / temperature).log_softmax(1)).sum(1).mean()


def rows(num: int, seed: int) -> Tensor:
    return torch.randn(num, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_processes() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, exchange, chunk in (("gather", GATHER, None), ("ring", RING, 2)):
        q, k, t = (rows(6, seed).chunk(2)[rank()].clone().requires_grad_() for seed in range(3))
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        how = {"temperature": temperature, "alpha": 0.4, "queue": rows(4, 3), "chunk_size": chunk}
        value = soft_contrast(q, k, t, exchange=exchange, **how)
        value.backward()
        assert k.grad is None
        assert t.grad is None
        found |= {f"{name}": value.detach(), f"{name}.q": q.grad, f"{name}.temperature": temperature.grad}
    words = [rows(5, 7).clone().requires_grad_(), rows(9, 8).T.clone().requires_grad_()]
    own = slice(0, 4) if rank() == 0 else slice(4, 5)  # one has four words, the other one
    value = masked_language(words[0][own], words[1], torch.arange(5)[own], all_reduce=all_reduce)
    value.backward()
    return found | {"words": value.detach(), "words.hidden": words[0].grad, "words.head": words[1].grad}


def test_two_processes_equal_one(tmp_path) -> None:
    q, temperature = rows(6, 0).requires_grad_(), leaf(np.float64(0.3))
    expected = naive(q, rows(6, 1), rows(6, 2), rows(4, 3), temperature, 0.4)
    expected.backward()
    words = [rows(5, 7).requires_grad_(), rows(9, 8).T.clone().requires_grad_()]
    of_words = F.cross_entropy(words[0] @ words[1], torch.arange(5))
    of_words.backward()
    records = in_processes(two_processes, 2, tmp_path)
    for name in ("gather", "ring"):
        for index, record in enumerate(records):
            close(record[name], expected.detach().numpy(), value=1e-9)
            close(record[f"{name}.q"] / 2, q.grad.chunk(2)[index].numpy(), grad=1e-9)
        close(sum(record[f"{name}.temperature"] for record in records) / 2, temperature.grad.numpy(), grad=1e-9)
    for part, leaf_ in zip(("hidden", "head"), words, strict=True):
        close(sum(record[f"words.{part}"] for record in records) / 2, leaf_.grad.numpy(), grad=1e-9)
    assert all(record["words"].item() == pytest.approx(of_words.item(), rel=1e-9) for record in records)


def test_soft_contrast_at_its_ends() -> None:
    q, k, t = rows(6, 0).requires_grad_(), rows(6, 1), rows(6, 2)
    options = {"temperature": 0.2, "queue": rows(0, 3)}
    assert torch.autograd.gradcheck(lambda x: soft_contrast(x, k, t, alpha=0.3, chunk_size=4, **options), q)
    plain = F.cross_entropy(F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2, torch.arange(6))
    torch.testing.assert_close(soft_contrast(q, k, t, alpha=0.0, **options), plain)
    torch.testing.assert_close(soft_contrast(3 * q, 2 * k, 5 * t, alpha=0.0, **options), plain)
    same = torch.ones(6, 5)
    assert soft_contrast(same, same, same, temperature=0.07, alpha=0.4, queue=same[:4]).item() == pytest.approx(
        np.log(10)
    )
    assert soft_contrast(same.bfloat16(), same.bfloat16(), same, temperature=1e-3, alpha=0.4).dtype == torch.float32
    with pytest.raises(ValueError, match=r"queue is \(K, D\) as wide as query"):
        soft_contrast(same, same, same, temperature=1.0, alpha=0.0, queue=torch.ones(3, 4))


def test_masked_language_at_its_ends() -> None:
    hidden, head = rows(5, 0).requires_grad_(), rows(9, 1).T.clone().requires_grad_()
    teacher, targets = (rows(5, 2), rows(9, 3).T, None), torch.arange(5)
    assert torch.autograd.gradcheck(
        lambda x, w: masked_language(x, w, targets, teacher=teacher, alpha=0.4, chunk_size=2), (hidden, head)
    )
    empty = masked_language(hidden[:0], head, targets[:0], teacher=(teacher[0][:0], *teacher[1:]), alpha=0.4)
    assert torch.autograd.grad(empty, head)[0].abs().sum() == empty.item() == 0
    with pytest.raises(ValueError, match=r"hidden is \(M, D\)"):
        masked_language(hidden, head.T, targets)
    with pytest.raises(ValueError, match=r"alpha=0\.4 is the share of a teacher: give one"):
        masked_language(hidden, head, targets, alpha=0.4)
