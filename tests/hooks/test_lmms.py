"""The models of lmms-eval with the hooks of this package."""

from __future__ import annotations

from pathlib import Path

import apet
import pytest
import torch


def test_models_of_lmms_eval(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin with a stand-in for lmms-eval's registry: options go to `patch`, the others to its model."""
    package = tmp_path / "lmms_eval" / "models"
    package.mkdir(parents=True)
    (tmp_path / "lmms_eval" / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "import transformers\n"
        "AVAILABLE_SIMPLE_MODELS = {'llava_hf': 'LlavaHf', 'qwen2_vl': 'Qwen2_VL', 'other': 'Other'}\n"
        "AVAILABLE_CHAT_TEMPLATE_MODELS = {'llava_hf': 'LlavaHf'}\n"
        "class LlavaHf:\n"
        "    is_simple = True\n"
        "    def __init__(self, pretrained, batch_size=1):\n"
        "        self.batch_size = batch_size\n"
        "        self._model = transformers.LlavaForConditionalGeneration.from_pretrained(pretrained)\n"
        "    @property\n"
        "    def model(self):\n"
        "        return self._model\n"
        "class Chat(LlavaHf):\n"
        "    is_simple = False\n"
        "def get_model(name, force_simple=False):\n"
        "    assert name == 'llava_hf'\n"
        "    return LlavaHf if force_simple else Chat\n"
    )
    (package / "registry_v2.py").write_text("def ModelManifest(**fields):\n    return fields\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from apet import lmms

    assert lmms.manifests() == [
        {
            "model_id": "apet_llava_hf",
            "simple_class_path": "apet.lmms.simple_llava_hf",
            "chat_class_path": "apet.lmms.chat_llava_hf",
        },
        {"model_id": "apet_qwen2_vl", "simple_class_path": "apet.lmms.simple_qwen2_vl"},
    ]
    options = {"keep": 12, "basis": 10, "layout": "overwrite", "distinct": 2.0, "positions": "keep"}
    made = lmms.chat_llava_hf(pretrained=llava, **options, batch_size=3)
    assert (type(made).__name__, made.is_simple, made.batch_size) == ("ApetChat", False, 3)
    assert apet.options(made.model) == apet.Options(**options)
    assert lmms.simple_llava_hf.is_simple

    # Of a model that also speaks, the thinker is patched.
    class Omni(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thinker = made.model

    import lmms_eval.models as models_of_lmms

    monkeypatch.setattr(models_of_lmms, "get_model", lambda name, force_simple=False: Speaking)

    class Speaking:
        def __init__(self) -> None:
            self.model = Omni()

    apet.unpatch(made.model)
    assert apet.options(lmms.chat_qwen2_5_omni(keep=7).model.thinker).keep == 7
    with pytest.raises(AttributeError, match="no attribute 'simple_other'"):
        _ = lmms.simple_other
