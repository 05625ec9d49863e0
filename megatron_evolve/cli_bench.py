"""The benchmarks of the command line: one JSON object a line and row."""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

bench_app = typer.Typer(help="Benchmarks, one JSON line a row.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Benchmarks, one JSON line a row."""


@bench_app.command("kernels")
def bench_kernels(
    predict: Annotated[
        bool, typer.Option("--model", help="measure nothing: print what the roofline predicts, marked as such")
    ] = False,
    chip: Annotated[str | None, typer.Option(help="h100 or h200, for --model; h100 otherwise")] = None,
    size: Annotated[
        str | None, typer.Option(help="nano, super or ultra with the options below; a default list otherwise")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="tokens of a rank, repeatable; 8192 otherwise", min=1)
    ] = None,
    ep: Annotated[
        list[int] | None, typer.Option(help="ranks that share the experts, repeatable; 1 and 8", min=1)
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="frozen, full, lora8 or lora32, repeatable; frozen and lora32")
    ] = None,
    max_vio: Annotated[
        list[float] | None,
        typer.Option(help="largest load of an expert over the mean, less 1; repeatable; 0 otherwise"),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="triton, unfused, eager, loop, sequential-mlp, te-grouped-mlp, scattermoe or quack, repeatable"
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="timed runs of each provider, in turns; 20 otherwise", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write the rows there too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="rows are JSON in any case; errors too with this")] = False,
) -> None:
    """The routed experts against other ways to compute them: right first, then the time."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        check_kind(predict, {"--provider": provider, "--rounds": rounds}, {"--chip": chip})
        shaped = {"--tokens": tokens, "--ep": ep, "--mode": mode, "--max-vio": max_vio}
        if size is None:
            refuse(shaped, "a --size with {}: the default list has layers of its own; name a --size")
        from megatron_evolve.kernels.bench import cases, run, targets

        device = run.default_device()
        chosen = layers(predict, device, size, shaped)
        if predict:
            at = chip or "h100"
            beside = run.model_others(at) if size is None else ()
            write(chain(run.model(chosen, at), beside), out)
            return
        each = {"rounds": rounds or 20, "chip": None if device == "cpu" else targets.ceilings(device)}
        rows = [run.bench(chosen, device, tuple(provider or run.providers_on(device)), **each)]
        if size is None and device != "cpu":
            rows.append(run.bench_memory_bound(device, **each))
            rows.append(run.bench_gated([cases.shape_of("nano", 8192, ranks) for ranks in (8, 1)], device, **each))
        write(chain(*rows, run.without_time(device)), out)

    guarded(answer, as_json)


def layers(predict: bool, device: str, size: str | None, shaped: dict[str, Any]) -> Sequence[Any]:
    """The layers that are asked for. ValueError where this machine cannot run them."""
    from megatron_evolve.kernels.bench import cases

    if size is None:
        return cases.GPU_CASES if predict or device != "cpu" else cases.CPU_CASES
    if device == "cpu" and not predict:
        raise ValueError(
            f"the layers of {size} need a GPU to be measured and torch finds none: leave --size out for what a CPU "
            "can do, or add --model for what is predicted"
        )
    return cases.asked(size, *shaped.values())


def check_kind(predict: bool, measuring: dict[str, Any], predicting: dict[str, Any]) -> None:
    """ValueError for an option that says how to measure where nothing is measured, or the other way round."""
    if predict:
        refuse(measuring, "no {} with --model: it measures nothing; leave one of them out")
    else:
        refuse(predicting, "--model with {}: what is measured is the GPU that is here; add --model")


def refuse(given: dict[str, Any], expected: str) -> None:
    """ValueError where one of these options has a value: it would do nothing."""
    named = [option for option, value in given.items() if value]
    if named:
        raise ValueError(f"expected {expected.format(' and '.join(named))}")


def write(rows: Iterable[dict[str, Any]], out: Path | None) -> None:
    """Each row as it comes, on stdout and, where asked, in a file: a benchmark cut short leaves what it had."""
    from megatron_evolve.kernels.bench.lines import line_of

    with out.open("w", encoding="utf-8") if out else nullcontext() as file:
        for row in rows:
            line = line_of(row)
            typer.echo(line)
            if file:
                file.write(line + "\n")
                file.flush()


@bench_app.command("tiles")
def bench_tiles(
    out: Annotated[Path | None, typer.Option(help="write the rows there too")] = None,
    save: Annotated[bool, typer.Option("--write", help="put the winners into the table that the kernels read")] = False,
    table: Annotated[Path | None, typer.Option(help="write the table with the winners there instead")] = None,
    rounds: Annotated[int, typer.Option(help="timed runs of each candidate, in turns", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="rows are JSON in any case; errors too with this")] = False,
) -> None:
    """Which tile each product of an expert layer runs best with on the GPU that is here."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.kernels.bench import run, tune

        if run.default_device() == "cpu":
            raise ValueError("bench tiles needs a GPU and torch finds none: run it on a machine with one")
        write(tune.rows("cuda", rounds=rounds, table=table or (tune.FILE if save else None)), out)

    guarded(answer, as_json)


@bench_app.command("host")
def bench_host(
    beside: Annotated[Path | None, typer.Option(help="another checkout, measured in turns with this one")] = None,
    rounds: Annotated[int, typer.Option(help="timed runs of each layer, in turns", min=1)] = 60,
    out: Annotated[Path | None, typer.Option(help="write the rows there too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="rows are JSON in any case; errors too with this")] = False,
) -> None:
    """What a layer of experts costs the host, launches stopped short of the driver: needs no GPU."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.kernels.bench import host

        write(host.rows(beside, rounds), out)

    guarded(answer, as_json)


@bench_app.command("train")
def bench_train(
    rounds: Annotated[int, typer.Option(help="timed steps of each, in turns", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="write the rows there too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="rows are JSON in any case; errors too with this")] = False,
) -> None:
    """Training on a CPU beside transformers' NemotronH, and decoding with state beside the whole sequence anew."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.substrate import speed

        write(speed.rows(rounds), out)

    guarded(answer, as_json)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a bench wrote. Raises ValueError with the line that holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as failure:
        raise ValueError(f"{path}: cannot be read ({failure.strerror}); give the file that a bench wrote") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes; give the file that a bench wrote") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
            row = None
        if not isinstance(row, dict):
            told = line if len(line) <= 40 else f"{line[:37]}..."
            raise ValueError(
                f"{path} line {number}: expected a JSON object, got {told}; give the file that a bench wrote"
            )
        found.append(row)
    return found


@bench_app.command("plot")
def bench_plot(
    rows: Annotated[Path, typer.Argument(help="JSON lines of bench kernels or of gpu_check")],
    out: Annotated[Path, typer.Option(help="the SVG to write")],
    title: Annotated[str | None, typer.Option(help="above the bars; the file's name otherwise")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="errors as JSON")] = False,
) -> None:
    """A picture of the layers' times, forward and backward, provider beside provider."""
    from megatron_evolve.cli import guarded

    def answer() -> None:
        from megatron_evolve.kernels.bench import plot

        found = read_rows(rows)
        out.write_text(plot.svg(found, title or rows.stem), encoding="utf-8")
        typer.echo(str(out))

    guarded(answer, as_json)
