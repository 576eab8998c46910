"""The recipes of docs/recipes/language-models.md, beside the forms that make all logits."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import worlds
from pages import needs, run_snippet, snippet, training_arguments
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from fused_kd import TopK, kd_loss, nkd_loss
from fused_kd.sources import CHUNK_BYTES

VOCABULARY = 13


class Tiny(nn.Module):
    """A language model of which the last layer has rows of padding."""

    def __init__(self, width, padded, *, bias=False, tied=False):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(padded, width), nn.Linear(width, width), nn.Tanh())
        self.lm_head = nn.Linear(width, padded, bias=bias)
        if tied:
            self.lm_head.weight = self.model[0].weight

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch(rows=4, tokens=6, vocabulary=VOCABULARY):
    ids = torch.randint(vocabulary, (rows, tokens))
    return ids, ids.where(torch.rand(rows, tokens) < 0.8, -100)


def dense(student_logits, teacher_logits, labels, vocabulary, reduction="mean"):
    """Of logits, whose padding is cut off."""
    logits = (each[:, :-1, :vocabulary] for each in (student_logits, teacher_logits))
    return nkd_loss(*logits, labels[:, 1:], ce_weight=1.0, ignore_index=-100, reduction=reduction)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("bias,tied", ((False, False), (True, False), (False, True)), ids=("plain", "bias", "tied"))
def test_the_loss_is_that_of_the_logits(bias, tied):
    distillation = run_snippet("language_model")["distillation"]
    student, teacher = Tiny(8, 16, bias=bias, tied=tied), Tiny(5, 14).requires_grad_(False)
    ids, labels = batch()
    with torch.no_grad():
        taught = teacher(ids)
    loss = distillation(student, teacher, ids, labels, vocabulary=VOCABULARY)
    expected = dense(student(ids), taught, labels, VOCABULARY)
    torch.testing.assert_close(loss, expected)
    found = gradients(loss, student)
    torch.testing.assert_close(found, gradients(expected, student))
    if not tied:
        of_head = dict(zip(dict(student.named_parameters()), found, strict=True))["lm_head.weight"]
        assert of_head[:VOCABULARY].any() and not of_head[VOCABULARY:].any()


def test_batches_of_one_step_are_divided_by_all_their_labels():
    distillation = run_snippet("language_model")["distillation"]
    student, teacher = Tiny(8, 16), Tiny(5, 14).requires_grad_(False)
    batches = [batch(2), batch(3), (torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -100))]
    count = sum(labels[:, 1:].ne(-100).sum() for _, labels in batches)  # a Tensor, as the Trainer has it
    losses = [distillation(student, teacher, *each, count, VOCABULARY) for each in batches]
    assert losses[-1] == 0
    with torch.no_grad():
        taught = [teacher(ids) for ids, _ in batches]
    sums = [
        dense(student(ids), logits, labels, VOCABULARY, "sum")
        for (ids, labels), logits in zip(batches, taught, strict=True)
    ]
    expected = sum(sums) / count
    torch.testing.assert_close(sum(losses), expected)
    torch.testing.assert_close(gradients(sum(losses), student), gradients(expected, student))
    assert distillation(student, teacher, *batches[-1], torch.tensor(0), VOCABULARY) == 0  # a step without a label


def allocated(step, folder):
    """The peak of what PyTorch allocates in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    path = folder / "trace.json"
    prof.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def test_a_model_of_transformers(tmp_path, monkeypatch, record_property):
    """Built from a configuration: the losses and gradients of a step, and what it allocates at the most."""
    needs("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    distillation = run_snippet("language_model")["distillation"]
    vocabulary, padded = 5000, 5056
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(vocab_size=padded, hidden_size=width, tie_word_embeddings=tied, **shape))
        for width, tied in ((16, True), (8, False))
    )
    teacher.eval().requires_grad_(False)
    ids, labels = batch(4, 64, vocabulary)
    count = labels[:, 1:].ne(-100).sum()

    def with_logits():
        with torch.no_grad():
            taught = teacher(input_ids=ids).logits
        loss = dense(student(input_ids=ids).logits, taught, labels, vocabulary, "sum") / count
        loss.backward()
        return loss.detach()

    def with_heads():
        loss = distillation(student, teacher, ids, labels, count, vocabulary, use_cache=False)
        loss.backward()
        return loss.detach()

    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**20)
    peaks, results = {}, []
    for step in (with_logits, with_heads):
        student.zero_grad()
        results.append((step(), [parameter.grad.clone() for parameter in student.parameters()]))
        student.zero_grad()
        peaks[step.__name__] = allocated(step, tmp_path)
        record_property(f"peak bytes {step.__name__}", peaks[step.__name__])
        print(f"{step.__name__}: {peaks[step.__name__] / 1e6:.1f} MB")
    torch.testing.assert_close(*(loss for loss, _ in results))
    torch.testing.assert_close(*(found for _, found in results), rtol=1e-4, atol=1e-6)
    logits = 4 * ids[:, 1:].numel() * vocabulary
    assert peaks["with_logits"] > 3 * logits
    assert peaks["with_heads"] < peaks["with_logits"] - 2 * logits


def test_a_model_of_transformers_with_other_names():
    needs("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    source = snippet("language_model").replace("model.model", "model.base_model")
    names = {}
    exec(source.replace("model.lm_head", "model.get_output_embeddings()"), names)
    shape = {"n_layer": 1, "n_head": 2, "n_positions": 8}
    student, teacher = (
        GPT2LMHeadModel(GPT2Config(vocab_size=padded, n_embd=width, **shape)).eval()
        for width, padded in ((8, 16), (6, 14))
    )
    teacher.requires_grad_(False)
    ids, labels = batch()
    loss = names["distillation"](student, teacher, ids, labels, vocabulary=VOCABULARY)
    expected = dense(student(ids).logits, teacher(ids).logits, labels, VOCABULARY)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, student), gradients(expected, student))


def distillation_module():
    names = run_snippet("distillation_module")
    names["distillation"] = run_snippet("language_model")["distillation"]
    return names["Distillation"]


def trained(wrapper, tied, ids, labels, count):
    """The student's weights after three steps."""
    torch.manual_seed(0)
    student, teacher = Tiny(8, 16, tied=tied).double(), Tiny(5, 14).double()
    model = module = distillation_module()(student, teacher, VOCABULARY)
    for _ in range(2):
        assert student.training and not teacher.training
        module.train()
    if wrapper == "DDP":
        model = DistributedDataParallel(module)
    elif wrapper == "FSDP":
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for part in (student.model[1], teacher.model[1], module):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels, count)["loss"].backward()
        optimizer.step()
    return [each.full_tensor() if wrapper == "FSDP" else each.detach() for each in student.parameters()]


def trained_by_all(rank, size, wrapper, tied):
    """Each process has rows of its own, and the weights become those of one process with all rows."""
    torch.manual_seed(1)
    ids, labels = batch(2 * size)
    count, own = int(labels[:, 1:].ne(-100).sum()), slice(2 * rank, 2 * rank + 2)
    alone = trained(None, tied, ids, labels, count)
    torch.testing.assert_close(trained(wrapper, tied, ids[own], labels[own], count / size), alone)


def test_several_processes():
    world = worlds.World(2)
    try:
        for wrapper in ("DDP", "FSDP"):
            for tied in (False, True):
                world.run(trained_by_all, wrapper, tied)
    finally:
        world.close()


def test_the_trainer(tmp_path):
    """One step of four micro-batches is that of all their rows."""
    needs("transformers", "accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    student, teacher = (LlamaForCausalLM(config) for _ in range(2))
    by_hand = copy.deepcopy(student)
    ids = torch.randint(VOCABULARY, (8, 6))
    labels = ids.where(torch.rand(8, 6) < 0.6, -100)
    attention = torch.ones_like(ids)
    attention[::2, 4:], labels[::2, 4:] = 0, -100
    args = training_arguments(tmp_path, gradient_accumulation_steps=4, remove_unused_columns=False)
    rows = zip(ids, labels, attention, strict=True)
    items = [dict(zip(("input_ids", "labels", "attention_mask"), row, strict=True)) for row in rows]
    Trainer(model=distillation_module()(student, teacher), args=args, train_dataset=items).train()
    with torch.no_grad():
        taught = teacher(input_ids=ids, attention_mask=attention).logits
    dense(by_hand(input_ids=ids, attention_mask=attention).logits, taught, labels, VOCABULARY).backward()
    for name, parameter in by_hand.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(student.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6)


def test_log_probabilities_of_a_serving_engine():
    """Dictionaries as engines give them, of as many classes as they please, train the student towards the teacher."""
    names = run_snippet("kept")
    student, teacher = Tiny(8, VOCABULARY, bias=True), Tiny(5, VOCABULARY).requires_grad_(False)
    ids, labels = batch()
    told = []
    for row in ids:
        log_probs = teacher(row[:-1]).log_softmax(-1)  # a token's are those before it
        told.append([None])
        for place, each in enumerate(log_probs):
            best = each.topk(3 + place % 2)
            values = [SimpleNamespace(logprob=float(value)) for value in best.values]
            told[-1].append(dict(zip(best.indices.tolist(), values, strict=True)))
    values, classes = (torch.stack(each) for each in zip(*(names["stored"](row, 4) for row in told), strict=True))
    assert values.shape == (*ids.shape, 4) and (classes[:, 1, 3] == -1).all() and (classes[:, 0] == -1).all()
    loss = names["distillation"](student, ids, values, classes, labels, temperature=2.0)
    kept = TopK(values[:, 1:], classes[:, 1:], rest="bucket")
    dense = kd_loss(student(ids)[:, :-1], kept, labels[:, 1:], temperature=2.0, ce_weight=1.0, ignore_index=-100)
    torch.testing.assert_close(loss, dense)
    optimizer, first = torch.optim.Adam(student.parameters(), 0.05), loss.detach()
    for _ in range(20):
        optimizer.zero_grad()
        loss = names["distillation"](student, ids, values, classes, labels, temperature=2.0)
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first
