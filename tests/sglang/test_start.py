"""Options of ApET that an engine is started with, as by `--mm-process-config`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from served import Served, agree, picture

NAME = "qwen2_5_vl"


def test_options_of_the_start_up(folder: Callable[[str], Path]) -> None:
    """They hold for all requests, which override them one by one."""
    config = {"apet": {"apet_keep": 12, "apet_layout": "overwrite", "apet_basis": 4}}
    engine = Served(NAME, folder(NAME), mm_process_config=config)
    try:
        images = [picture(112, 168, 1), picture(84, 280, 2)]
        rule = {"layout": "overwrite", "basis": 4}
        found = engine.ask(images)
        assert agree(found, engine.expect(images, keep=12, **rule))
        assert agree(engine.ask(images, apet_keep=7), engine.expect(images, keep=7, **rule))
        inplace = {"apet_layout": "inplace", "apet_basis": "keep"}
        assert agree(engine.ask(images, **inplace), engine.expect(images, keep=12))
        whole = engine.ask(images, apet_keep=1.0)
        assert agree(whole, engine.expect(images))
        assert found.prompt < whole.prompt
    finally:
        engine.close()
