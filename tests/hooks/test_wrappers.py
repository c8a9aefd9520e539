"""Models in wrappers of torch and PEFT, before and after `patch`, and the deletion of models."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import collate
from families import FAMILIES, Family, build, twin
from recompute import expected
from running import BOTH, TOLERANCE, conversation, judge, say
from torch import nn


@pytest.fixture
def fresh() -> Iterator[None]:
    """Drops compiled code before and after the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def last_logits(family: Family, options: dict[str, Any]) -> torch.Tensor:
    row = conversation(family, 3, "image", 5)
    return expected(twin(family.name), family, row, [], **options).logits[0]


# ---- compiled -------------------------------------------------------------------------------------------------------


def eager_compilation() -> dict[str, Any]:
    compilation = transformers.CompileConfig(backend="eager", fullgraph=False, mode=None)
    compilation._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compilation}


def test_generate_follows_a_patch_after_it_has_compiled(fresh: None) -> None:
    """transformers keeps its compiled decode step on the model."""
    family, model = FAMILIES["llava"], build("llava")
    row = conversation(family, 3, "image", 5)
    before = say(model, collate(family, [row]), **eager_compilation())
    apet.patch(model, **BOTH)
    judge(family, [row], say(model, collate(family, [row]), **eager_compilation()), BOTH)
    apet.unpatch(model)
    after = say(model, collate(family, [row]), **eager_compilation())
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.slow  # minutes; `make test` runs the test above
@pytest.mark.parametrize(
    "what",
    ["layer", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("model", "forward", "language model"))],
)
def test_a_patch_after_the_first_compiled_call(what: str, fresh: None) -> None:
    family, model = FAMILIES["llava"], build("llava")
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    call: Any = model
    if what == "model":
        call = torch.compile(model, backend="eager")
    elif what == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif what == "language model":
        model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    else:
        model.model.language_model.layers[2].compile(backend="eager")
    before = call(**inputs).logits
    apet.patch(call, **BOTH)
    torch.testing.assert_close(call(**inputs).logits[0, -1], last_logits(family, BOTH), rtol=0, atol=TOLERANCE)
    apet.unpatch(call)
    torch.testing.assert_close(call(**inputs).logits, before, rtol=0, atol=TOLERANCE)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["wrap, then patch", "patch, then wrap"])
@pytest.mark.parametrize("saved", [["multi_modal_projector"], None], ids=["projector saved", "adapters alone"])
def test_peft(order: str, saved: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """New LoRA adapters are zero, so the answers are those of the model without them."""
    peft = pytest.importorskip("peft")
    family, model = FAMILIES["llava"], build("llava")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    copied: list[int] = []
    monkeypatch.setattr(type(model), "__deepcopy__", lambda self, memo: copied.append(1) or self, raising=False)
    if order.startswith("patch"):
        apet.patch(model, **BOTH)
    wrapped = peft.get_peft_model(model, config)
    if order.startswith("wrap"):
        apet.patch(wrapped, **BOTH)
    assert apet.options(wrapped) == apet.options(model)
    row = conversation(family, 3, "image", 5)
    out = wrapped(**collate(family, [row]))
    torch.testing.assert_close(out.logits[0, -1], last_logits(family, BOTH), rtol=0, atol=TOLERANCE)
    judge(family, [row], say(wrapped, collate(family, [row])), BOTH)
    assert not copied
    apet.unpatch(wrapped)
    whole = wrapped(**collate(family, [row])).logits
    assert whole.shape[1] == len(row.ids)
    assert whole.isfinite().all()


# ---- several processes and devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["wrap, then patch", "patch, then wrap"])
def test_distributed_data_parallel(order: str, tmp_path: Any) -> None:
    family, model = FAMILIES["llava"], build("llava")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        if order.startswith("patch"):
            apet.patch(model, **BOTH)
        wrapped = nn.parallel.DistributedDataParallel(model)
        if order.startswith("wrap"):
            apet.patch(wrapped, **BOTH)
        out = wrapped(**collate(family, [conversation(family, 3, "image", 5)]))
        torch.testing.assert_close(out.logits[0, -1], last_logits(family, BOTH), rtol=0, atol=TOLERANCE)
        assert apet.options(wrapped) == apet.options(model)
    finally:
        torch.distributed.destroy_process_group()


def replica(module: nn.Module) -> nn.Module:
    """Returns a replica as of DataParallel for another device: other modules, which share hooks and attributes."""
    twins = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for one, other in twins.items():
        for name, child in one._modules.items():
            other._modules[name] = None if child is None else twins[child]
        for name, parameter in one._parameters.items():
            setattr(other, name, None if parameter is None else parameter.detach().clone())
        other._buffers = {n: None if b is None else b.clone() for n, b in one._buffers.items()}
    return twins[module]


@pytest.mark.parametrize("name", ["llava", "llava_next"])  # Qwen's have no dtype as replicas, patched or not
def test_replicas_use_their_own_modules(name: str) -> None:
    """As on another GPU: the hooks must call modules of the replica, not of the patched model."""
    family, model = FAMILIES[name], build(name)
    apet.patch(model, **BOTH)
    copied = replica(model)
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter.data, torch.nan)  # a wrong module would give NaN
    for buffer in model.model.language_model.rotary_emb.buffers():
        if buffer.is_floating_point():
            buffer.data = torch.full_like(buffer.data, torch.nan)
    out = copied(**collate(family, [conversation(family, 3, "image", 5)]))
    torch.testing.assert_close(out.logits[0, -1], last_logits(family, BOTH), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("order", ["wrap, then patch", "patch, then wrap"])
def test_data_parallel(order: str) -> None:
    """On a CPU the wrapper calls the model itself; `test_replicas_use_their_own_modules` is about devices."""
    family, model = FAMILIES["llava"], build("llava")
    if order.startswith("patch"):
        apet.patch(model, **BOTH)
    wrapped = nn.DataParallel(model)
    if order.startswith("wrap"):
        apet.patch(wrapped, **BOTH)
    assert apet.options(wrapped) == apet.options(model) == apet.Options(**BOTH)
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    out = wrapped(**inputs)
    torch.testing.assert_close(out.logits[0, -1], last_logits(family, BOTH), rtol=0, atol=TOLERANCE)
    apet.unpatch(wrapped)
    assert wrapped(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def sharded(model: nn.Module, kind: str) -> nn.Module:
    """Shards a model, and each of its decoder layers as a unit of its own, as its users do."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    layers = model.model.language_model.layers
    if kind == "fully_shard":
        mesh = init_device_mesh("cpu", (1,))
        for layer in layers:
            fsdp.fully_shard(layer, mesh=mesh)
        return fsdp.fully_shard(model, mesh=mesh)
    each = fsdp.wrap.ModuleWrapPolicy({type(layers[0])})
    return fsdp.FullyShardedDataParallel(
        model, auto_wrap_policy=each, use_orig_params=True, device_id=torch.device("cpu")
    )


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # of one process
@pytest.mark.parametrize("order", ["wrap, then patch", "patch, then wrap"])
@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "fully_shard"])
def test_fully_sharded_data_parallel(kind: str, order: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fully_shard` changes the classes of the modules, and the other one wraps them. The self-check runs, too: it
    builds models of the classes of transformers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("apet.hooks.sources.digests", dict)
    family, model = FAMILIES["llava"], build("llava")
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        if order.startswith("patch"):
            apet.patch(model, **BOTH)
        wrapped = sharded(model, kind)
        if order.startswith("wrap"):
            apet.patch(wrapped, **BOTH)
        assert apet.options(wrapped) == apet.options(model) == apet.Options(**BOTH)
        for _ in range(2):  # the first call gathers the parameters, and shards them again
            out = wrapped(**inputs)
            torch.testing.assert_close(out.logits[0, -1], last_logits(family, BOTH), rtol=0, atol=TOLERANCE)
        apet.unpatch(wrapped)
        assert wrapped(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    finally:
        torch.distributed.destroy_process_group()


def test_rotary_embeddings_of_another_device() -> None:
    """In a model on several devices, tensors for all layers are on the first one. Fake tensors have devices."""
    from apet.hooks.sequence import Packing
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        there = torch.device("cuda", 1)
        index = torch.zeros(1, 6, dtype=torch.int64, device=there)
        packing = Packing(index, torch.ones(1, 6, dtype=torch.bool, device=there), index, index.new_zeros(1, 8))
        for shape, dim in (((1, 8, 16), -2), ((3, 1, 8), -1)):
            assert packing.along(torch.zeros(shape, device="cuda:0"), dim).device == there
        assert packing.rows(torch.zeros(1, 8, 4, device="cuda:0")).device == there


# ---- copies, and deleted models -------------------------------------------------------------------------------------


def test_a_copied_projector_belongs_to_the_same_patch() -> None:
    family, model = FAMILIES["llava"], build("llava")
    apet.patch(model, **BOTH)
    model.model.multi_modal_projector = copy.deepcopy(model.model.multi_modal_projector)
    row = conversation(family, 3, "image", 5)
    judge(family, [row], say(model, collate(family, [row])), BOTH)
    apet.unpatch(model)
    assert model(**collate(family, [row])).logits.shape[1] == len(row.ids)


@pytest.mark.parametrize("what", ["unpatched", "patched", "patched, then unpatched", "patched twice"])
def test_del_frees_the_model(what: str) -> None:
    """It is freed without the garbage collector, so a script can load one model after another."""
    family, model = FAMILIES["llava"], build("llava")
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    for _ in range({"unpatched": 0, "patched twice": 2}.get(what, 1)):
        apet.patch(model, **BOTH)
    say(model, inputs)
    if what.endswith("unpatched"):
        apet.unpatch(model)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "port"),
    [("llava_llama", "LlavaForConditionalGeneration"), ("internvl_chat", "InternVLForConditionalGeneration")],
)
def test_classes_that_are_not_of_transformers(name: str, port: str) -> None:
    """The error explains what to load, or what an adapter must set. (test_own_model.py has a complete such class.)"""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    if name == "internvl_chat":  # a shell around a whole causal model
        shell = nn.Module()
        shell.language_model, shell.config = model, model.config
        model = shell
    type(model.config).model_type, before = name, type(model.config).model_type
    try:
        with pytest.raises(ValueError, match=port):
            apet.patch(model, keep=4)
        apet.register_adapter(name, apet.Adapter())
        with pytest.raises(ValueError, match="LlamaForCausalLM takes no images: its forward has no pixel_values"):
            apet.patch(model, keep=4)
    finally:
        type(model.config).model_type = before
