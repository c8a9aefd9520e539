"""python -m apet.hooks.record: adds the installed transformers to tested.json, after its tests have passed.

`make matrix` runs it for each version for which the tests of the hooks have passed.
"""

from __future__ import annotations

import json

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import selfcheck, tiny
from .adapters import adapter_for
from .target import Target
from .versions import FILE, digests

# The decoders of LLaVA-style checkpoints.
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def files() -> dict[str, str]:
    """Returns the files of transformers that the hooks rely on for the families that have an adapter, with their
    digests. Raises SystemExit if the self-check of one of these models fails, since a recorded version is not checked
    any more."""
    found: dict[str, str] = {}
    if not selfcheck.families():
        raise SystemExit(f"transformers {transformers.__version__} has none of the families that have an adapter")
    for name in selfcheck.families():
        cls = getattr(transformers, selfcheck.NAMES[name])
        result = selfcheck.check_family(name)
        if result.error is not None:
            raise SystemExit(result.message())
        usual = transformers.AutoConfig.for_model(name).get_text_config().model_type
        takes_any = usual in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for decoder in DECODERS if takes_any else (None,):
            model = tiny.build(cls, tiny.config(name, decoder))
            target = Target.find(model, adapter_for(model), lambda *_: selfcheck.STAGES["first"])
            digest, unchanged = selfcheck.code(selfcheck.classes_of(target))
            if not unchanged:
                raise SystemExit(f"functions of {cls.__name__} are not those of transformers' files")
            found |= digest
            if decoder in (None, usual):
                continue
            result = selfcheck.check(model)
            if result.error is not None:
                raise SystemExit(f"{name} with the decoder {decoder}: {result.message()}")
    return dict(sorted(found.items()))


def main() -> None:
    """Writes tested.json."""
    known = digests() | {transformers.__version__: files()}
    ordered = sorted(known, key=lambda version: tuple(map(int, version.split("."))))
    FILE.write_text(json.dumps({version: known[version] for version in ordered}, indent=1) + "\n")
    print(f"{FILE.name}: {len(known[transformers.__version__])} files of transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
