"""``tokensieve demo``: a page in the browser, with methods side by side."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.commands.arguments import METHODS, Data, Methods, check_scopes, split_specs, with_load_options
from tokensieve.commands.console import note
from tokensieve.commands.loading import foreign_images, trained_spec
from tokensieve.errors import MissingExtra
from tokensieve.loading import LoadOptions, load_model, without_folder


@with_load_options()
def demo(
    loading: LoadOptions,
    model: Annotated[str, typer.Argument(help="Folder or hub name; 'reference' is the bundled one.")] = "reference",
    methods: Methods = METHODS,
    data: Data = "reference",
    runs: Annotated[Path, typer.Option(help="Folder of comparisons; each has a folder in it.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page that shows methods side by side: answers, kept tokens, costs, conversations and comparisons.

    Examples and comparisons take their questions from --data. The page works offline. Ctrl-C ends it.
    """
    if find_spec("gradio") is None:
        raise MissingExtra("the page needs gradio", "demo")
    from tokensieve.evaluate.plan import Settings
    from tokensieve.report.extra import check_report_extra
    from tokensieve.serve.listening import listen

    specs = split_specs(methods)
    check_scopes("image", Settings().plan(specs, [0.25]))  # a bad spec is refused before a model is loaded
    check_report_extra()
    listener = listen(host, port)
    from tokensieve.demo.examples import examples
    from tokensieve.demo.run import Workbench

    shown = examples(data)
    vlm, processor = load_model(model, loading, classifiers=True)
    if methods == METHODS and not vlm.can_generate():
        specs = [trained_spec(model, vlm)]
    with tempfile.TemporaryDirectory(prefix="tokensieve-demo-") as uploads:
        # read when Gradio is imported: uploads end with the page, and no use is reported to anyone
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        from tokensieve.demo.jobs import Jobs
        from tokensieve.demo.page import build_page
        from tokensieve.demo.server import run

        bench = Workbench(without_folder(model), vlm, processor, specs)
        jobs = Jobs(bench, runs, data, loading)
        page = build_page(bench, shown, jobs, specs, foreign_images(model) or "")
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        note(f"the page is at {url} (Ctrl-C ends it)")
        code = run(page, jobs, listener, url, browser=browser)
    if code == 130:
        note("tokensieve: interrupted")
    sys.stdout.flush()
    sys.stderr.flush()
    # a generation may still compute in its thread: an interpreter that ends under it aborts
    os._exit(code)
