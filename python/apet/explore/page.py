"""The web page in Gradio: its components, their callbacks, and the server. No other module imports Gradio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from apet import ApetError
from apet.explore import view
from apet.explore.explorer import Explorer
from apet.explore.files import MOST_TOKENS
from apet.explore.settings import DEFAULT, METHODS, Link, Settings, read_link
from apet_kernels.options import LAYOUTS, MAX_BASIS, MAX_REFINE, SELECTS

TITLE = "What is kept of a picture"
SCRIPT = (files(__package__) / "page.js").read_text(encoding="utf-8")
STYLE = view.STYLE + (files(__package__) / "page.css").read_text(encoding="utf-8")
BASIS_INFO = "0: as many as are kept, with qr"
ALONE = ("basis", "layout", "select", "refine")  # settings that only ApET has
FIRST_MOST = 576  # the slider's largest number of tokens, until a file is opened


def build(explorer: Explorer, start: Path | None) -> gr.Blocks:
    """Builds the page; `start` is the file that it shows at first, or None."""
    with gr.Blocks(
        title=f"apet: {TITLE}", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    ) as page:
        gr.HTML(f'<header class="apet head"><h1>{TITLE}</h1></header>')
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="controls", min_width=280, scale=0):
                file = gr.File(start and str(start), label="Photo or clip", height=130, elem_id="file")
                frame = gr.Slider(1, 8, 1, step=1, label="Frame of the clip", visible=False)
                first = _controls("", DEFAULT, True)
                compare = gr.Checkbox(False, label="Compare with a second setting")
                second = _controls(", B", replace(DEFAULT, method="uniform"), False)
            with gr.Column(elem_id="shown", min_width=300, scale=1):
                shown = gr.HTML(view.message("One moment ..."), js_on_load="window.apet.mount(element, watch)")
                with gr.Row(elem_id="save"):
                    picture = gr.Button("Picture (PNG)", size="sm")
                    numbers = gr.Button("Numbers (JSON)", size="sm")
                    copy = gr.Button("Copy link", size="sm")
                if explorer.asker is not None:
                    with gr.Group():
                        prompt = gr.Textbox(label=f"Ask {explorer.asker.name}", placeholder="What is in the picture?")
                        ask = gr.Button("Ask with all tokens and with those kept")
                    answers = gr.HTML()
        made = gr.JSON(visible=False)

        settings = [frame, compare, *first[1], *second[1]]
        inputs = [file, *settings]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        quick = {**quiet, "queue": False}  # answered at once, in a thread of its own
        opening = {**quiet, "concurrency_limit": None}  # queued, since Gradio shows only the warnings of queued events

        def show(path: str | None, *values: Any) -> str:
            return explorer.page(path, _link(values))

        def opened(path: str | None, *values: Any) -> list[Any]:
            """Adapts the controls to a new file: to its number of tokens and of frames."""
            return _state(explorer, path, replace(_link(values), frame=1), [])

        def started(path: str | None, request: gr.Request) -> list[Any]:
            """Sets the controls from the address once the page is loaded."""
            link, messages = read_link(dict(request.query_params))
            return _state(explorer, path, link, messages)

        everything = [shown, *settings, second[0]]
        page.load(started, file, everything, **opening)
        file.change(opened, inputs, everything, **opening)
        for one in (frame, *first[1], *second[1]):
            one.input(show, inputs, shown, trigger_mode="always_last", **quick)
        for method, _, *alone in (first[1], second[1]):
            method.input(_of_method, method, alone, **quick)
        compare.input(lambda on: gr.update(visible=on), compare, second[0], **quick)
        compare.input(show, inputs, shown, trigger_mode="always_last", **quick)

        def saved(make: Callable[[str, Link], dict[str, str]]) -> Callable[..., dict[str, str]]:
            def save(path: str | None, *values: Any) -> dict[str, str]:
                try:
                    if path is None:
                        raise ApetError("there is no photo or clip yet")
                    return make(path, _link(values))
                except ApetError as error:
                    raise gr.Error(str(error), print_exception=False) from error

            return save

        for button, make in ((picture, explorer.picture), (numbers, explorer.numbers)):
            button.click(saved(make), inputs, made, **quick).success(None, made, None, js="window.apet.save")
        copy.click(None, None, None, js="window.apet.copy")
        if explorer.asker is not None:

            def asked(path: str | None, words: str, *values: Any) -> Any:
                yield from explorer.answers(path, _link(values), words)

            gr.on(
                [ask.click, prompt.submit],
                asked,
                [file, prompt, *settings],
                answers,
                concurrency_limit=1,  # other users wait in the queue, and the page shows that
                api_visibility="private",
            )
    return page


def serve(page: gr.Blocks, *, port: int | None, megabytes: int, allowed: Sequence[Path], browser: bool) -> str:
    """Starts the server, reachable only from this machine; returns its address.

    Raises: ApetError, if the port is taken.
    """
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Liberation Sans", "Arial", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in fonts],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")],
    )
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=browser,
            max_file_size=f"{megabytes}mb",
            allowed_paths=[str(path) for path in allowed],
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme,
            css=STYLE,
            head=f"<script>{SCRIPT}</script>",
        )
    except OSError as error:
        raise ApetError(
            f"cannot listen on port {port or 'from 7860 on'} of 127.0.0.1: choose another --port"
        ) from error
    return address


def _controls(whose: str, of: Settings, visible: bool) -> tuple[gr.Group, list[Any]]:
    """Makes the controls of a setting. Returns their group, and the controls in the order of `Settings`."""
    alone = of.method == "apet"
    with gr.Group(visible=visible) as group:
        method = gr.Dropdown([(name, key) for key, name in METHODS.items()], value=of.method, label=f"Method{whose}")
        keep = gr.Slider(1, FIRST_MOST, of.keep, step=1, label=f"Tokens kept{whose}")
        basis = gr.Slider(0, MAX_BASIS, of.basis, step=1, label=f"Basis tokens{whose}", info=BASIS_INFO, visible=alone)
        layout = gr.Radio(LAYOUTS, value=of.layout, label=f"Layout{whose}", visible=alone, elem_classes="choice")
        select = gr.Radio(SELECTS, value=of.select, label=f"Selection{whose}", visible=alone, elem_classes="choice")
        refine = gr.Slider(0, MAX_REFINE, of.refine, step=1, label=f"Medoid steps{whose}", visible=alone)
    return group, [method, keep, basis, layout, select, refine]


def _of_method(method: str) -> list[Any]:
    """Shows the controls that only ApET has, or hides them."""
    return [gr.update(visible=method == "apet")] * len(ALONE)


def _link(values: Sequence[Any]) -> Link:
    """Converts the values of the controls, in the order of `settings` in `build`."""
    frame, compare, *rest = values
    first, second = (
        Settings(method, int(keep), int(basis), layout, select, int(refine))
        for method, keep, basis, layout, select, refine in (rest[:6], rest[6:])
    )
    return Link(first, second if compare else None, int(frame))


def _state(explorer: Explorer, path: str | None, link: Link, messages: list[str]) -> list[Any]:
    """Returns the updates of `everything` in `build` for a file and the settings of an address. Values that do not fit
    the file are changed, with a warning."""
    frames, most = 1, MOST_TOKENS
    if path is not None:
        try:
            found = explorer.files.get(Path(path))
            frames, most = len(found.photos), found.grid[0] * found.grid[1]
        except ApetError:
            pass  # the page shows the error
    for name, one in (("", link.first), ("second ", link.second)):
        if one is not None and one.keep > most:
            messages.append(f"{name}keep={one.keep} is more than the {most} tokens of this picture")
    if link.frame > frames:
        messages.append(f"frame={link.frame} is more than the {frames} there are")
    for message in messages:
        gr.Warning(f"{message}: changed to what there is")
    first = replace(link.first, keep=min(link.first.keep, most))
    second = link.second and replace(link.second, keep=min(link.second.keep, most))
    link = Link(first, second, min(link.frame, frames))
    other = second or replace(DEFAULT, method="uniform", keep=first.keep)
    updates: list[Any] = [
        explorer.page(path, link),
        gr.update(value=link.frame, maximum=max(frames, 2), visible=frames > 1),
        second is not None,
    ]
    for one in (first, other):
        changed: dict[str, dict[str, Any]] = {name: {"visible": one.method == "apet"} for name in ALONE}
        changed["keep"] = {"maximum": most}
        updates += [gr.update(value=value, **changed.get(name, {})) for name, value in asdict(one).items()]
    return [*updates, gr.update(visible=second is not None)]
