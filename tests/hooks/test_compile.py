"""A compiled decode step with a static cache is compiled once for all prompts, and its results are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import collate
from families import FAMILIES, TAKES_CACHE_POSITION, THREE, UNSAID, build, shared, twin
from recompute import expected
from running import BOTH, FIRST, TOLERANCE, Said, conversation, judge
from torch import fx

STEPS = 5


class Graphs:
    """A backend of torch.compile that runs graphs unchanged, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:  # transformers copies configurations
        return self


# Compiling takes seconds, so `make test` runs one loop; it compiles `generate` in tests/hooks/test_wrappers.py.
DAILY = (("qwen2_5_vl", "both"),)
SLOW = {name: [pytest.mark.slow] if name in THREE else [pytest.mark.slow, pytest.mark.matrix] for name in FAMILIES}
LOOPS = [
    pytest.param(name, options, id=f"{name}-{stage}", marks=() if (name, stage) in DAILY else SLOW[name])
    for name in FAMILIES
    for stage, options in (("first", FIRST), ("both", BOTH))
]
SOME = [pytest.param(name, marks=SLOW[name]) for name in FAMILIES]


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()


@pytest.mark.parametrize(("name", "options"), LOOPS)
def test_own_loop(name: str, options: dict[str, Any], graphs: Graphs) -> None:
    """Only the first step of the first prompt compiles, not the next ones or those of a longer prompt."""
    family, model = FAMILIES[name], shared(name)
    step = torch.compile(model.forward, backend=graphs, dynamic=False)
    compiled = []
    with apet.patched(model, **options):
        for parts in ([3, "image", 5], [2, "image1", 3, "image2", 4]):
            row = conversation(family, *parts)
            cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
            out = model(**collate(family, [row]), past_key_values=cache, use_cache=True)
            tokens, logits = [], []
            for i in range(STEPS):
                said = out.logits[:, -1]
                logits.append(said)
                tokens.append(said.index_fill(1, torch.tensor(UNSAID), -torch.inf).argmax(-1))
                at = {"cache_position": torch.tensor([len(row.ids) + i])} if TAKES_CACHE_POSITION else {}
                out = step(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True, **at)
                compiled.append(graphs.count)
            judge(family, [row], Said(torch.stack(tokens, 1), torch.stack(logits, 1), None), options)
    assert compiled[0] > 0
    assert compiled == [compiled[0]] * (2 * STEPS)


@pytest.mark.parametrize("name", SOME)
def test_generate(name: str, graphs: Graphs) -> None:
    """`generate` compiles its step for a static cache, and not again for another number of tokens."""
    family, model = FAMILIES[name], shared(name)
    row = conversation(family, 3, "image", 5)
    compilation = transformers.CompileConfig(backend=graphs, fullgraph=False, mode=None)
    compilation._compile_all_devices = True
    counts = []
    with apet.patched(model, **BOTH):
        for new in (3, 8):
            torch._dynamo.reset()
            graphs.count = 0
            out = model.generate(
                **collate(family, [row]),
                max_new_tokens=new,
                do_sample=False,
                suppress_tokens=UNSAID,
                cache_implementation="static",
                compile_config=compilation,
                output_logits=True,
                return_dict_in_generate=True,
            )
            counts.append(graphs.count)
            judge(family, [row], Said(out.sequences[:, len(row.ids) :], torch.stack(out.logits, 1), None), BOTH)
    assert counts[0] == counts[1] > 0


def test_compiled_model() -> None:
    """`patch` of `torch.compile(model)` patches the model in it."""
    family = FAMILIES["llava"]
    model, row = build("llava"), conversation(family, 3, "image", 5)
    compiled = torch.compile(model)
    chosen = apet.patch(compiled, **BOTH)
    assert apet.options(model) == apet.options(compiled) == chosen
    with torch.compiler.set_stance("force_eager"):  # only the place of the hooks is tested
        said = [call(**collate(family, [row])).logits[0, -1] for call in (model, compiled)]
    want = expected(twin("llava"), family, row, [], **BOTH).logits[0]
    for logits in said:
        torch.testing.assert_close(logits, want, rtol=0, atol=TOLERANCE)
    apet.unpatch(compiled)
    assert apet.options(model) is None
