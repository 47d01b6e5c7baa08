"""``tokensieve serve``: an OpenAI-compatible server with a method attached, on vLLM or on transformers."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import typer

from tokensieve.commands.arguments import BudgetScope, Repair, with_load_options
from tokensieve.commands.console import note
from tokensieve.errors import MissingExtra, Refusal
from tokensieve.loading import LoadOptions, find, load_model, without_folder

PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")  # the extra "serve"
LIMITS = "Limits"  # heading of these options in --help


@with_load_options()
def serve(
    loading: LoadOptions,
    model: Annotated[str, typer.Argument(help="Folder or hub name; 'reference' is the bundled one.")],
    engine_arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments for vLLM's own server.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="Method spec; 'full' drops nothing.")] = "vtc-cls",
    keep: Annotated[
        str | None, typer.Option(help="Budget: tokens (36) or a share (0.25, 25%).", show_default="the method's own")
    ] = None,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"], typer.Option(help="auto: vLLM where it is installed.")
    ] = "auto",
    allow_method: Annotated[
        list[str] | None, typer.Option(help="Method that a request may choose; may be repeated.")
    ] = None,
    allow_keep: Annotated[bool, typer.Option("--allow-keep", help="A request may choose its budget.")] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch images given as URLs, from public addresses only.")
    ] = False,
    allow_path: Annotated[
        list[str] | None, typer.Option(help="Further POST path of vLLM, checked for size and time only.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="MODEL without its folder")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running requests after SIGTERM.")] = 30.0,
    positions: Annotated[
        Literal["original", "contiguous"], typer.Option(help="Whether kept tokens keep their position ids.")
    ] = "original",
    budget_scope: BudgetScope = "image",
    repair: Repair = None,
    from_tokens: Annotated[int, typer.Option(min=0, help="On vLLM: images of fewer tokens stay whole.")] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a body.", rich_help_panel=LIMITS)] = 32_000_000,
    max_body_seconds: Annotated[
        float, typer.Option(help="Seconds for a body to arrive.", rich_help_panel=LIMITS)
    ] = 30.0,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request.", rich_help_panel=LIMITS)] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image.", rich_help_panel=LIMITS)] = 40_000_000,
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of the texts.", rich_help_panel=LIMITS)] = 100_000,
    max_answer: Annotated[int, typer.Option(min=1, help="Largest max_tokens.", rich_help_panel=LIMITS)] = 4096,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in the engine.", rich_help_panel=LIMITS)] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait.", rich_help_panel=LIMITS)] = 64,
) -> None:
    """Serve a model with a method attached: POST /v1/chat/completions as OpenAI's, /v1/models, /health, /metrics.

    Images are sent as data URLs. SIGTERM lets running requests finish.
    """
    from tokensieve.budget import parse_budget
    from tokensieve.methods import parse
    from tokensieve.methods.spec import expand
    from tokensieve.serve import Limits, Settings
    from tokensieve.serve.listening import listen

    given: dict[str, Any] = {"positions": positions, "budget_scope": budget_scope, "separators": "kept-lines"}
    (method, *allow_method), options = expand([method, *(allow_method or [])], **given, repair=repair)
    budget = {} if keep is None else {"keep": parse_budget(keep)}
    parse(method, **budget)  # a bad spec is refused before a model is loaded
    for spec in allow_method:
        parse(spec)
    for path in allow_path or []:
        if not path.startswith("/"):
            raise Refusal(f"--allow-path takes a path such as /v1/completions; got {path!r}")
    served = name or without_folder(model)
    limits = Limits(
        body_bytes=max_body,
        body_seconds=max_body_seconds,
        images=max_images,
        pixels=max_pixels,
        prompt_characters=max_prompt,
        answer_tokens=max_answer,
        concurrency=concurrency,
        queue=queue,
    )
    settings = Settings(
        models=(served,),
        limits=limits,
        allow_urls=allow_urls,
        methods=tuple(dict.fromkeys([method, *allow_method])) if allow_method else (),
        allow_keep=allow_keep,
        paths=tuple(allow_path or ()),
    )
    vllm = find_spec("vllm") is not None
    if engine == "vllm" and not vllm:
        raise MissingExtra("--engine vllm needs vllm", "vllm")
    if engine == "vllm" or (engine == "auto" and vllm):
        if options["budget_scope"] != "image":
            raise Refusal(f"vLLM serves budgets of each image; got --budget-scope {options['budget_scope']}")
        if options["repair"] is not None:
            raise Refusal(f"vLLM's attention takes no bias; got --repair {options['repair']}: --engine transformers")
        listen(host, port).close()  # vLLM itself ends in a traceback where the address is in use
        find(model, loading.revision)  # a wrong path is refused in the words of the other commands
        from tokensieve.serve.vllm_command import command, run
        from tokensieve.vllm import checkpoint, engine_options, placeholders, renders_begin_of_text
        from tokensieve.vllm.private import installed

        try:
            positions = options["positions"]
            vllm_options = engine_options(
                model, method, allowed=settings.methods[1:], positions=positions, from_tokens=from_tokens, **budget
            )
        except Refusal as error:
            raise Refusal(f"{error}; --engine transformers serves without vLLM") from error
        folder, further = checkpoint(model), engine_arguments or ()
        begin_of_text = not renders_begin_of_text(folder)
        settings = replace(settings, begin_of_text=begin_of_text, placeholders=placeholders(folder))
        address: dict[str, Any] = {"host": host, "port": port, "grace": grace}
        arguments = command(folder, vllm_options, settings, loading, **address, release=installed(), further=further)
        run(arguments, settings)
    if from_tokens:
        raise Refusal("--from-tokens is for vLLM: transformers reduces images of all sizes")
    if engine_arguments:
        raise Refusal(f"arguments after -- are for vLLM, which does not serve here; got {' '.join(engine_arguments)}")
    if settings.paths:
        raise Refusal("--allow-path is for vLLM; transformers serves chat requests only")
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingExtra(f"serving needs {', '.join(missing)}", "serve")
    from tokensieve.serve import embedded
    from tokensieve.vllm.settings import METHOD

    listener = listen(host, port)
    vlm, processor = load_model(model, loading)
    attached = embedded.Attached(vlm, processor, method, budget.get("keep"), **options)
    for spec in settings.methods:
        attached.attach({METHOD: spec})  # one that the model cannot run is refused now
    attached.attach({})
    app = embedded.build_app(attached, served, settings)
    note(f"serving {served} with {attached} on http://{host}:{port}/v1 (transformers)")
    embedded.run(app, listener, grace)
