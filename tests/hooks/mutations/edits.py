"""Changes the source of functions of transformers and compiles it again; and the table of the changes.

Edits are made in the source as `ast.unparse` writes it: one line to a statement, keywords as `name=`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers
from apet.hooks.calling import NAMES
from families import FAMILIES

# The names of the cache in this version, in the language model and in generate().
CACHE = next(n for n in NAMES["cache"] if n in inspect.signature(transformers.LlamaModel.forward).parameters)
DECODERS = {
    "llava": ("LlamaModel", "LlamaDecoderLayer", "LlamaAttention", "LlamaRotaryEmbedding"),
    "qwen2_5_vl": (
        "Qwen2_5_VLTextModel",
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLAttention",
        "Qwen2_5_VLRotaryEmbedding",
    ),
    "qwen3_vl": (
        "Qwen3VLTextModel",
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLTextAttention",
        "Qwen3VLTextRotaryEmbedding",
    ),
}


class NotThisVersion(Exception):
    """The source that a mutation edits is different in the installed transformers."""


class Classes:
    """The classes of a family, and edits of their functions until the test ends."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch):
        self.name, self.monkeypatch, self.edited = name, monkeypatch, False
        self.model = getattr(transformers, FAMILIES[name].model)
        self.module = inspect.getmodule(self.model)
        self.core = getattr(self.module, self.model.__name__.replace("ForConditionalGeneration", "Model"))
        self.decoder_module = inspect.getmodule(transformers.LlamaModel) if name == "llava" else self.module
        self.lm, self.layer, self.attention, self.rotary = (getattr(self.decoder_module, n) for n in DECODERS[name])

    def edit(self, owner: Any, *changes: tuple[str, str], method: str = "forward", more: dict | None = None) -> None:
        """Replaces a function of a class or module by its edited source. changes: (regular expression, new text); each
        must match."""
        source = source_of(owner, method)
        for pattern, new in changes:
            source, count = re.subn(pattern, new, source)
            if not count:
                raise NotThisVersion(f"{owner.__name__}.{method} has no {pattern!r} in\n{source}")
        names = inspect.unwrap(vars(owner)[method]).__globals__ | (more or {})
        exec(compile(source, f"<{owner.__name__}.{method}, changed>", "exec"), names)
        self.monkeypatch.setattr(owner, method, names[method])
        self.edited = True

    def layer_call(self, pattern: str, new: str) -> tuple[str, str]:
        """Returns a change within the call of a decoder layer."""
        return rf"(= decoder_layer\([^\n]*?){pattern}", rf"\g<1>{new}"

    def lm_call(self, pattern: str, new: str) -> tuple[str, str]:
        """Returns a change within the core model's call of its language model."""
        return rf"(= self\.language_model\([^\n]*?){pattern}", rf"\g<1>{new}"

    def rename_for_layers(self, old: str, new: str, *more: tuple[str, str]) -> None:
        """Renames an argument of the decoder layers, also in their calls. more: changes of a layer."""
        self.edit(self.layer, renamed(old, new), *more)
        self.edit(self.lm, self.layer_call(f"{old}=", f"{new}="))

    def rename_for_lm(self, old: str, new: str, *more: tuple[str, str]) -> None:
        """Renames an argument of the language model, also in its calls."""
        self.edit(self.lm, renamed(old, new), *more)
        self.edit(self.core, self.lm_call(f"{old}=", f"{new}="))

    def after_init(self, owner: type, change: Callable[[Any], None]) -> None:
        """Changes instances after they are made."""
        init = owner.__init__

        def changed(this: Any, *args: Any, **kwargs: Any) -> None:
            init(this, *args, **kwargs)
            change(this)

        self.monkeypatch.setattr(owner, "__init__", changed)
        self.edited = True


def source_of(owner: Any, method: str) -> str:
    """Returns the source of a function, normalised, without the decorator that reads sources to write documentation."""
    source = inspect.getsource(inspect.unwrap(vars(owner)[method]))
    (tree,) = ast.parse(f"class Indented:\n{source}" if source[0] == " " else source).body
    if isinstance(tree, ast.ClassDef):
        (tree,) = tree.body
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = [d for d in tree.decorator_list if "auto_docstring" not in ast.unparse(d)]
    return ast.unparse(tree)


# Where a decoder layer begins.
FIRST_LINE = r"\n    residual = [^\n]*(?=\n    hidden_states = self\.input_layernorm)"


def renamed(old: str, new: str) -> tuple[str, str]:
    """Renames a local name or parameter, but no keyword of a call."""
    return rf"(?<![\w.'\"]){old}\b(?!=[^=]|['\"])", new


def bare(name: str) -> tuple[str, str]:
    """Removes the annotation of a parameter."""
    return rf"\b{name}: [\w. |]+=", f"{name}="


@dataclass(frozen=True)
class Mutation:
    apply: Callable[[Classes], None]
    families: tuple[str, ...] = ("llava",)
    # The error of `patch` or the call, by stage; a stage that is missing here must give the right answers.
    says: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # new names of the arguments of a call
    faithful: bool = True  # the unpatched model computes the same as before


MUTATIONS: dict[str, Mutation] = {}
ALL = tuple(DECODERS)


def mutation(
    *families: str, says: str | None = None, first: str | None = None, both: str | None = None, **more: Any
) -> Callable[[Callable[[Classes], None]], Callable[[Classes], None]]:
    """Adds a mutation of these families. says: part of the error with the first stage and with both. first, both: the
    same, if they differ or one of them is right."""
    texts = {stage: text for stage, text in (("first", first or says), ("both", both or says)) if text is not None}

    def add(apply: Callable[[Classes], None]) -> Callable[[Classes], None]:
        MUTATIONS[apply.__name__] = Mutation(apply, families, texts, **more)
        return apply

    return add
