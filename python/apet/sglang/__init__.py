"""An SGLang plugin: SGLang compresses the visual tokens of its models if `apet_keep` is set (docs/engines.md).

SGLang finds `register` by itself, as an entry point of the group `sglang.srt.plugins`, in every one of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Hooks into SGLang's input processing, and into where its models embed pictures; without `apet_keep` both behave
    as before.

    Raises: RuntimeError, before anything is hooked, if this SGLang has another form. (SGLang logs it and continues
    without the plugin.)
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ..engines.versions import check
    from . import model, request, versions

    check("SGLang", versions.USED)
    HookRegistry.register(versions.PROCESSOR, request.serve, HookType.AFTER)
    HookRegistry.register(versions.PREPARE, model.prepare, HookType.AROUND)
    HookRegistry.register(versions.EMBED, model.embed, HookType.AROUND)
