"""The command `zipmoe`: words typed by a person -> calls of the library -> words and exit codes.

The only place that prints. It imports what a command needs when that command runs, so that --help
answers at once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from ._options import Codec, Compute, Context, Json, Memory, Store, Tiers, memory_size
from ._plan_command import plan
from ._quantize_command import quantize
from ._routing_commands import bench_app, trace_app
from ._serve_command import serve
from ._terminal import CORRUPT_STORE, USER_ERROR, Terminal, reporting

app = typer.Typer(
    name="zipmoe",
    help=(
        "Run Mixture-of-Experts language models that do not fit in memory, bit for bit as "
        "published.\n\n\b\n"
        "First steps:\n"
        "  zipmoe demo                                  see it work, no download of weights\n"
        "  zipmoe pack Qwen/Qwen1.5-MoE-A2.7B my-store  compress a checkpoint, losslessly\n"
        "  zipmoe chat my-store --memory 6GB            talk to it inside that much memory\n"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Most tokens of one answer.")]
Temperature = Annotated[
    float,
    typer.Option(
        min=0, metavar="T", help="0 takes the likeliest token each time; more is more varied."
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="S", help="Seed of the draws when the temperature is above 0.")
]
Record = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write which experts each token chose to this file, for `zipmoe trace show` and "
        "`zipmoe bench policy`.",
    ),
]


def _show_version(*, asked: bool) -> None:
    if asked:
        Terminal(as_json=False).write(f"zipmoe {__version__}\n")
        raise typer.Exit


@app.callback()
def common(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def pack(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint, or its id on the hub."
        ),
    ],
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder to make.")],
    *,
    codec: Annotated[
        Codec,
        typer.Option(
            metavar="NAME",
            help="How exponents are stored: rank223, rank3, rank4, zstd, lz4hc or raw. "
            "All are lossless; raw does not compress.",
        ),
    ] = "rank223",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads that encode. Default: all cores."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a checkpoint into a store, losslessly.

    The store takes about two thirds of the checkpoint's bytes and keeps every bit. Packing streams,
    so it needs little memory whatever the size of the model. If it is stopped, even by a power cut,
    run the same command again: it goes on where it was.

    \b
    Examples:
      zipmoe pack Qwen/Qwen1.5-MoE-A2.7B my-store
      zipmoe pack ./mixtral-8x7b my-store --codec rank3 --json
    """
    from ._report import packed
    from .pack import pack_checkpoint

    terminal = Terminal(as_json=as_json)
    with reporting(terminal, mismatch=USER_ERROR):
        with terminal.progress("Packing") as progress:
            report = pack_checkpoint(checkpoint, store, codec=codec, jobs=jobs, progress=progress)
        terminal.document(asdict(report))
        terminal.write(packed(store, report) + "\n")


@app.command()
def unpack(
    store: Store,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.")],
    *,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy",
            help="Of a lossy store: write its experts as BF16. They are not the published ones.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore the original checkpoint, byte for byte, and prove it.

    Every tensor and file is compared with the SHA-256 of the original, so a weight file can be
    checked against the one its hub page shows. A lossy store is refused: its experts are not the
    original ones any more.

    \b
    Example:
      zipmoe unpack my-store original
    """
    from .unpack import unpack_store

    terminal = Terminal(as_json=as_json)
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    with reporting(terminal, mismatch=USER_ERROR if taken else CORRUPT_STORE):
        with terminal.progress("Unpacking") as progress:
            report = unpack_store(store, folder, progress=progress, lossy=lossy)
        terminal.document(asdict(report))
        if report.changed_tensors:
            terminal.write(
                f"{folder}: lossy: {report.changed_tensors} of {report.tensors} tensors hold "
                "experts that are not the original ones; every other SHA-256 is\n"
            )
        else:
            terminal.write(f"{folder}: restored, every SHA-256 is that of the original\n")


@app.command()
def verify(store: Store, *, as_json: Json = False) -> None:
    """Read every byte of a store and check every checksum.

    Names each bad record: file, tensor, layer, expert, plane and offset. Leaves with 3 if anything
    is wrong.

    \b
    Example:
      zipmoe verify my-store && echo sound
    """
    from ._report import verified
    from .verify import verify_store

    terminal = Terminal(as_json=as_json)
    with reporting(terminal):
        with terminal.progress("Verifying") as progress:
            report = verify_store(store, progress=progress)
        terminal.document(verified(report))
        for error in report.errors:
            terminal.say(f"zipmoe: {error}")
        if report.errors:
            raise typer.Exit(CORRUPT_STORE)
        terminal.write(f"{store}: sound\n")
        if report.lossy:
            terminal.say(
                f"{report.lossy.summary()}. Checksums are those of what was written: the original "
                "experts cannot be restored or compared with"
            )


@app.command()
def inspect(store: Store, *, as_json: Json = False) -> None:
    """Say what is in a store.

    That is: model, sizes, ratio per kind of tensor, codecs, and which tensors are raw and why.

    \b
    Example:
      zipmoe inspect my-store
    """
    from ._report import summary
    from .inspect import inspect_store

    terminal = Terminal(as_json=as_json)
    with reporting(terminal):
        found = inspect_store(store)
        terminal.document(asdict(found))
        terminal.write(f"{summary(found)}\n")


@app.command()
def profile(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A store, or any folder on the drive.")
    ] = Path(),
    *,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again, whatever is known.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine: how fast it reads, decodes and multiplies.

    Takes half a minute the first time, and is remembered for this processor and this drive. The
    fastest way of reading is used from then on. Nothing else should be running.

    \b
    Example:
      zipmoe profile my-store
    """
    from ._report import profiled
    from .hardware import profile as measured

    terminal = Terminal(as_json=as_json)
    with reporting(terminal), terminal.progress("measuring") as progress:
        found = measured(folder, refresh=refresh, progress=progress)
    terminal.document(asdict(found))
    terminal.write(f"{profiled(found)}\n")


app.command()(plan)
app.command()(quantize)


@app.command()
def generate(
    store: Store,
    *,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="What to answer, or to continue where the model has no chat template; - reads it "
            "from stdin.",
        ),
    ],
    memory: Memory = None,
    context: Context = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most tokens of the answer; refused if the context has no room for them. "
            "Default: 256, or what the context has room for.",
        ),
    ] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    compute: Compute = "native",
    tiers: Tiers = None,
    record: Record = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt with a packed model, inside a memory budget.

    The text goes to stdout as it is written; how the memory is shared out, what was promised and
    what was taken go to stderr.

    \b
    Examples:
      zipmoe generate my-store --prompt "What is the capital of France?" --memory 2GB
      zipmoe generate my-store --prompt - --max-tokens 500 --json < question.txt
    """
    from ._report import measured
    from ._session import Forecasts, answer, loaded_model, recorded

    terminal = Terminal(as_json=as_json)
    with reporting(terminal):
        text = sys.stdin.read() if prompt == "-" else prompt
        options = {"context": context, "compute": compute, "tiers": tiers}
        with (
            loaded_model(terminal, store, memory=memory, **options) as loaded,
            recorded(terminal, loaded, record),
        ):
            result = answer(
                terminal,
                loaded,
                text,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
            terminal.say(measured(result))
            forecast = Forecasts(terminal, loaded).beside(result)
            more = {"memory": loaded.memory.as_dict(), "forecast": forecast and asdict(forecast)}
            terminal.document(result.as_dict() | more)


@app.command()
def chat(
    store: Store,
    *,
    memory: Memory = None,
    context: Context = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    compute: Compute = "native",
    tiers: Tiers = None,
    record: Record = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Instruction that stands before the conversation."),
    ] = None,
) -> None:
    """Talk with a packed model, inside a memory budget.

    Ctrl-C stops an answer and not the program. /exit or Ctrl-D leaves, /new begins again.

    \b
    Example:
      zipmoe chat my-store --memory 6GB
    """
    from ._chat import Chat
    from ._session import Forecasts, loaded_model, recorded

    terminal = Terminal(as_json=False)
    options = {"context": context, "compute": compute, "tiers": tiers}
    answers = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with (
        reporting(terminal),
        loaded_model(terminal, store, memory=memory, **options) as loaded,
        recorded(terminal, loaded, record),
    ):
        forecasts = Forecasts(terminal, loaded)
        Chat(terminal, loaded, system=system, after=forecasts.beside, **answers).run()


@app.command()
def demo(
    *,
    memory: Annotated[
        int, typer.Option(parser=memory_size, metavar="SIZE", help="Memory for the chat.")
    ] = 1_500_000_000,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the model is kept. Default: zipmoe/demo in the user's cache."
        ),
    ] = None,
    questions: Annotated[
        bool,
        typer.Option("--questions", help="Answer three questions and end, as without a terminal."),
    ] = False,
    build_only: Annotated[
        bool, typer.Option("--build-only", help="Make the checkpoint, and neither pack nor chat.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a small model, pack it, and chat with it.

    The model is SmolLM2-135M-Instruct upcycled to 16 experts per layer: 1.3 billion parameters,
    2.7 GB, made on this machine in about a minute, the same bytes everywhere, and kept for the next
    time. The chat runs in less memory than that. All of it takes 4.5 GB of disk. The model is small
    and often wrong; it shows that zipmoe works.
    """
    from . import _demo_session
    from .demo import cache_folder

    terminal = Terminal(as_json=as_json)
    with reporting(terminal):
        session = _demo_session.DemoSession(terminal, folder or cache_folder())
        if build_only:
            terminal.document(session.build())
            return
        document = session.prepare()
        from ._session import loaded_model

        with loaded_model(terminal, document["store"]["folder"], memory=memory) as loaded:
            if questions or as_json or not sys.stdin.isatty():
                document["answers"] = session.answer_questions(loaded)
                terminal.document(document)
            else:
                from ._chat import Chat

                Chat(terminal, loaded, max_tokens=256, temperature=0.0, seed=0).run()


app.command()(serve)
app.add_typer(trace_app, name="trace")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line of this process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
