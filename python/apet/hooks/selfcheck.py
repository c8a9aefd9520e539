"""Where a model is not as tested, a tiny random one of the same classes shows whether the hooks are right on it.

The tiny model is patched and called: two rows, padded, then three more tokens, with a cache that grows and one of
fixed size. Its logits have to be those of an independent reference: the decoder that is not patched, one row at a time,
without padding and without a cache, given the rows that were kept, with positions and every other argument along the
sequence gathered for them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import state, tiny
from .calling import Arguments, implementation, within
from .config import Options
from .engine import Engine
from .target import Target
from .versions import TESTED, TORCH, digests

TOLERANCE = 1e-3  # of logits of standard deviation 1.2; rounding is 1e-5, and mistakes are 0.1 and more
STAGES = {
    "first": Options(keep=9, basis=4),
    "both": Options(keep=9, basis=4, llm_layer=2, llm_keep=0.5),
}
TOKENS = (11, 22, 33)  # that follow the prompt


def ensure(model: nn.Module, target: Target) -> None:
    """Checks a model's classes, unless they are as tested or have passed before with the same code.

    Raises ValueError where the check fails. Warns where there is no tiny model of the family.
    """
    name = model.config.model_type
    decoder = getattr(getattr(model.config, "text_config", None), "model_type", None)
    stage = "first" if target.options.llm_layer is None else "both"
    classes = classes_of(target)
    files, unchanged = code(classes)
    if unchanged and as_tested(files):
        return
    if tiny.settings(name) is None:
        _warn_once(
            f"apet has no tiny model of model_type='{name}' to check its hooks with under transformers "
            f"{transformers.__version__}: see docs/hooks.md for how to check an adapter"
        )
        return
    key = repr((name, decoder, stage, sorted(c.__qualname__ for c in classes), sorted(files.items()), _versions()))
    record = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if unchanged and record.exists():
        return
    result = check(type(model), name, decoder, stage, target)
    if result.error is not None:
        raise ValueError(result.message())
    if unchanged:
        _write(record, {"key": key, "difference": result.difference})


def classes_of(target: Target) -> set[type]:
    """The classes that the hooks of a model rely on."""
    modules = (target.model(), target.core(), target.language_model(), *target.layers())
    return {type(module) for module in modules}


@dataclass(frozen=True)
class Result:
    """What the self-check of a family found."""

    name: str  # its model_type
    stage: str  # "first" or "both"
    difference: float = 0.0  # the largest, of logits of standard deviation about 1
    error: str | None = None  # None: passed

    def message(self) -> str:
        stages = "first stage" if self.stage == "first" else "both stages"
        return (
            f"the hooks are not right for model_type='{self.name}' with transformers {transformers.__version__} and "
            f"torch {torch.__version__} ({stages}): {self.error}. This version of apet-kernels was tested with "
            f"transformers {', '.join(TESTED)} and torch {', '.join(TORCH)}: install one of these, or patch with "
            "check=False to use the model all the same"
        )


def check(cls: type, name: str, decoder: str | None = None, stage: str = "both", like: Target | None = None) -> Result:
    """Runs the self-check of a class of models. like: a target with the adapter and attention to use."""
    from .adapters import ADAPTERS

    adapter = ADAPTERS[name] if like is None else like.adapter
    attention = "sdpa"
    if like is not None and implementation(like.language_model().config) in ("eager", "sdpa"):
        attention = implementation(like.language_model().config)
    worst = 0.0
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny.build(cls, tiny.settings(name, decoder), attention)
            target = Target.find(model, adapter, lambda *_: STAGES[stage])
            inputs = tiny.inputs(name, model, target.core(), adapter)
            observed = Observed.of(model, target, inputs)
            expected = reference(model, target, observed)
            for kind, logits in observed.logits.items():
                difference = float((logits - expected).abs().max())
                worst = max(worst, difference)
                if not difference < TOLERANCE:
                    after = ["the prompt", *(f"{n} more tokens" for n in range(1, len(TOKENS) + 1))]
                    steps = (logits - expected).abs().amax(dim=(0, 2))
                    first = next(a for a, d in zip(after, steps.tolist(), strict=True) if not d < TOLERANCE)
                    return Result(
                        name, stage, difference, f"with {kind}, logits after {first} are off by {difference:.3g}"
                    )
    except Exception as error:
        return Result(name, stage, worst, f"{type(error).__name__}: {error}")
    return Result(name, stage, worst)


def families() -> list[str]:
    """The `model_type`s that have an adapter and a tiny model; registered adapters of a user's own have none."""
    from .adapters import ADAPTERS

    return sorted(name for name in ADAPTERS if tiny.settings(name) is not None)


def check_family(name: str) -> Result:
    """The self-check of a family by its `model_type`, both stages, on transformers' own class."""
    try:
        config = transformers.AutoConfig.for_model(name)
        cls = getattr(transformers, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration")
    except (AttributeError, ImportError, ValueError) as error:
        return Result(name, "both", error=f"transformers has no such model: {error}")
    return check(cls, name)


# ---- what the patched model does ------------------------------------------------------------------------------------


@dataclass
class Observed:
    """What a patched tiny model was seen to do, and what the model that is not patched calls its decoder with."""

    whole: dict[str, Any]  # arguments of the language model, for the whole prompt
    logits: dict[str, Tensor] = field(default_factory=dict)  # by the kind of cache: [B, 1 + TOKENS, V]
    rows: list[Tensor] = field(default_factory=list)  # what enters the decoder, and then layer `llm_layer`: [B, L, D]
    origin: list[Tensor] = field(default_factory=list)  # [B, L]: the columns in the whole prompt of these
    valid: list[Tensor] = field(default_factory=list)  # [B, L] bool

    @classmethod
    def of(cls, model: nn.Module, target: Target, inputs: Mapping[str, Tensor]) -> Observed:
        seen: list[dict[str, Any]] = []
        roles = target.language_model_arguments

        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(roles.bind(args, kwargs))

        handle = target.language_model().register_forward_pre_hook(listen, with_kwargs=True)
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
        observed = cls(seen[0])
        caches = [(kind, make()) for kind, make in _caches(model).items() if _works(model, make(), inputs)]
        engine = Engine(target)
        engine.install()
        try:
            for kind, cache in caches:
                watched = [0] if target.options.llm_layer is None else [0, target.options.llm_layer]
                rows: list[Tensor] = []
                handles = [_watch(target, index, rows) for index in watched]
                try:
                    logits = [_call(model, cache, **inputs)[:, -1]]
                finally:
                    for handle in handles:
                        handle.remove()
                trace = engine.trace
                mask = inputs["attention_mask"]
                for token in TOKENS:
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                    ids = mask.new_full((len(mask), 1), token)
                    logits.append(_call(model, cache, input_ids=ids, **_counts(model, mask.shape[1] - 1))[:, -1])
                observed.logits[kind] = torch.stack(logits, 1)
                if not observed.rows:
                    observed.rows = rows
                    observed.follow(trace, target, inputs)
        finally:
            engine.remove()
        return observed

    def follow(self, trace: state.Trace, target: Target, inputs: Mapping[str, Tensor]) -> None:
        """Where the rows of each stage stood in the whole prompt."""
        stages = len(trace.lengths) - 1
        if stages != len(self.rows):
            raise ValueError(f"{len(self.rows)} stages were expected to drop tokens, and {stages} did")
        given = trace.lengths[0]
        for rows, here in zip(self.rows, trace.here, strict=True):
            stays = inputs["attention_mask"].bool().flatten().index_fill(0, trace.flat, False)
            stays[trace.flat[here]] = True
            stays = stays.view(-1, given)
            length = rows.shape[1]
            columns = [row.nonzero().flatten() for row in stays]
            valid = torch.stack([torch.arange(length) >= length - len(c) for c in columns])
            origin = torch.stack([torch.cat([c.new_zeros(length - len(c)), c]) for c in columns])
            self.valid.append(valid)
            self.origin.append(origin)


def _watch(target: Target, index: int, rows: list[Tensor]) -> Any:
    roles = target.layer_arguments[index]

    def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(roles.get("hidden", roles.bind(args, kwargs)))

    return target.layers()[index].register_forward_pre_hook(
        listen, with_kwargs=True
    )  # after the engine's, so: what the layer gets


def _caches(model: nn.Module) -> dict[str, Callable[[], transformers.Cache]]:
    config = model.config.get_text_config()
    return {
        "a cache that grows": lambda: transformers.DynamicCache(config=config),
        "a cache of fixed size": lambda: transformers.StaticCache(config=config, max_cache_len=200),
    }


def _works(model: nn.Module, cache: transformers.Cache, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the model that is not patched takes a cache of that kind. Some versions of Qwen take none of fixed size
    outside of generate()."""
    ids = inputs["input_ids"]
    try:
        _call(model, cache, **inputs)
        _call(model, cache, input_ids=ids.new_full((len(ids), 1), TOKENS[0]), **_counts(model, ids.shape[1]))
    except Exception:
        if not cache.is_compileable:
            raise
        return False
    return True


def _call(model: nn.Module, cache: transformers.Cache, **inputs: Any) -> Tensor:
    name = Arguments.of(model, ("cache",)).names["cache"]
    return model(**inputs, **{name: cache}, use_cache=True).logits


def _counts(model: nn.Module, past: int) -> dict[str, Tensor]:
    """Before transformers 5.3 or so, models with M-RoPE know where they are by `cache_position` alone."""
    takes = "cache_position" in inspect.signature(model.forward).parameters
    return {"cache_position": torch.tensor([past])} if takes else {}


# ---- the reference --------------------------------------------------------------------------------------------------


def reference(model: nn.Module, target: Target, observed: Observed) -> Tensor:
    """The logits [B, 1 + TOKENS, V] of the decoder that is not patched, given the rows that were kept."""
    language_model, border = within(target.language_model()), target.options.llm_layer
    head = model.get_output_embeddings()
    early = language_model if border is None else _layers(language_model, 0, border)
    embedded = model.get_input_embeddings()(torch.tensor(TOKENS))  # [TOKENS, D]
    results = []
    for b in range(len(observed.valid[0])):
        columns = observed.origin[0][b][observed.valid[0][b]]  # [n] of the whole prompt
        x = torch.cat([observed.rows[0][b][observed.valid[0][b]], embedded])[None]
        x = _run(target, early, x, _gathered(target, observed, b, columns))
        if border is not None:
            columns = observed.origin[1][b][observed.valid[1][b]]
            x = torch.cat([observed.rows[1][b][observed.valid[1][b]], x[0, -len(TOKENS) :]])[None]
            late = _layers(language_model, border, len(language_model.layers))
            x = _run(target, late, x, _positions(target, observed, b, columns))
        results.append(head(x[0, -len(TOKENS) - 1 :]))
    return torch.stack(results)


def _layers(language_model: nn.Module, first: int, end: int) -> nn.Module:
    """The language model with some of its layers; the norm behind them only with the last."""
    part = copy.copy(language_model)
    part._modules = dict(language_model._modules)
    part.layers = nn.ModuleList(language_model.layers[first:end])
    if end < len(language_model.layers):
        part.norm = nn.Identity()
    return part


def _run(target: Target, language_model: nn.Module, x: Tensor, more: dict[str, Any]) -> Tensor:
    roles = target.language_model_arguments
    given = {roles.names["embeds"]: x, roles.names["mask"]: torch.ones(x.shape[:2], dtype=torch.long)}
    output = language_model(**given, **more, use_cache=False)
    return output[0]


def _positions(target: Target, observed: Observed, b: int, columns: Tensor) -> dict[str, Any]:
    """Positions of the kept rows, and of the tokens after them."""
    roles = target.language_model_arguments
    name, total = roles.names["positions"], len(columns) + len(TOKENS)
    if target.adapter.positions == "renumber":
        return {name: torch.arange(total)[None]}
    whole = observed.whole[name][-3:]  # [3, B, L]
    mask = observed.whole[roles.names["mask"]]
    valid = torch.ones(whole.shape[1:], dtype=torch.bool) if mask is None else mask.bool()
    ahead = int(whole[:, b][:, valid[b]].max()) + 1 + torch.arange(len(TOKENS))
    rotary = torch.cat([whole[:, b][:, columns], ahead.expand(len(whole), -1)], dim=1)[:, None]  # [3, 1, total]
    return {name: torch.cat([torch.arange(total)[None, None], rotary])}


def _gathered(target: Target, observed: Observed, b: int, columns: Tensor) -> dict[str, Any]:
    """Every argument along the sequence, for the kept rows; nothing of it for the tokens after them."""
    roles = target.language_model_arguments
    batch, length = observed.whole[roles.names["embeds"]].shape[:2]
    more = _positions(target, observed, b, columns)
    visual = observed.whole.get("visual_pos_masks")
    for name, value in observed.whole.items():
        if name in roles.names.values() or name in ("use_cache", "input_ids") or value is None:
            continue
        if isinstance(value, Tensor) and value.shape[:2] == (batch, length):
            row = value[b][columns]
            more[name] = torch.cat([row, row.new_zeros(len(TOKENS), *row.shape[1:])])[None]
        elif isinstance(value, list) and visual is not None:  # of the visual tokens alone
            number = (visual.flatten().cumsum(0) - 1).view_as(visual)[b][columns][visual[b][columns]]
            more[name] = [features[number] for features in value]
        elif not isinstance(value, Tensor | list | dict):
            more[name] = value
    return more


# ---- whether the code is as tested ----------------------------------------------------------------------------------


def as_tested(files: Mapping[str, str]) -> bool:
    """Whether the versions of transformers and torch, and every file of transformers, are those of the tests."""
    known = digests().get(transformers.__version__, {})
    minor = ".".join(torch.__version__.split(".")[:2])
    return minor in TORCH and all(known.get(name) == digest for name, digest in files.items())


def code(classes: set[type]) -> tuple[dict[str, str], bool]:
    """The files of transformers that the hooks of some classes rely on, with their digests, and whether the functions
    that are loaded are those of the files."""
    root = Path(inspect.getfile(transformers)).parent
    makers = ("create_causal_mask", "create_sliding_window_causal_mask")
    used = [f for f in (getattr(transformers.masking_utils, name, None) for name in makers) if f is not None]
    caches = (transformers.Cache, transformers.DynamicCache, transformers.StaticCache)
    for cls in (*caches, transformers.GenerationMixin):
        used += [f for f in vars(cls).values() if inspect.isfunction(f)]
    rotary = {c for cls in classes for c in vars(sys.modules[cls.__module__]).values() if _is_rotary(c)}
    for cls in {*classes, *rotary}:
        used += [
            f for f in (vars(c).get("forward") for c in cls.__mro__ if c is not nn.Module) if inspect.isfunction(f)
        ]
    places = {Path(f.__code__.co_filename) for function in used for f in _layers_of(function)}
    inside = {p for p in places if p.is_relative_to(root)}
    libraries = (Path(inspect.getfile(torch)).parent, Path(inspect.getfile(contextlib)).parent)  # their decorators
    beside = {Path(f.__code__.co_filename) for function in _beside(classes) for f in _layers_of(function)}
    unchanged = all(p.is_relative_to(root) or _is_of_library(p, libraries) for p in places | beside)
    return {p.relative_to(root).as_posix(): _digest(p) for p in sorted(inside)}, unchanged


def _beside(classes: set[type]) -> Iterator[Callable[..., Any]]:
    """All functions of all modules in the files of some classes: of attention, too, and of what makes positions."""
    for name in {cls.__module__ for cls in classes}:
        for cls in vars(sys.modules[name]).values():
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == name:
                yield from (f for f in vars(cls).values() if inspect.isfunction(f))


def _is_of_library(path: Path, libraries: Iterable[Path]) -> bool:
    """Whether a file is torch's or Python's own. Other packages lie within Python's folder, too."""
    within = [path.relative_to(library).parts for library in libraries if path.is_relative_to(library)]
    return any("site-packages" not in parts for parts in within)


def _is_rotary(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__name__.endswith("RotaryEmbedding")


def _layers_of(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function and all that it wraps."""
    while function is not None:
        if hasattr(function, "__code__"):
            yield function
        function = getattr(function, "__wrapped__", None)


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@functools.cache
def _versions() -> dict[str, str]:
    own = importlib.metadata.version("apet-kernels")
    return {"apet-kernels": own, "transformers": transformers.__version__, "torch": torch.__version__}


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "apet-kernels" / "selfcheck"


def _write(path: Path, record: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    except OSError:  # a home that cannot be written: the check runs again next time
        pass


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=4)
