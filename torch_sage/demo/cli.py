"""The command line: ``python -m torch_sage demo``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from torch_sage.demo import models, report
from torch_sage.demo.measure import STEPS_BESIDE_TIMING, ModelResult, measure
from torch_sage.demo.model import transformers
from torch_sage.demo.packages import MissingPackageError

app = typer.Typer(add_completion=False, no_args_is_help=True)


class ModelName(str, Enum):
    """The demo's models; keys of ``models.PACKAGES``."""

    smollm2 = "smollm2"
    whisper = "whisper"
    dinov2 = "dinov2"


_SECONDS_PER_WORKLOAD = {False: 12.0, True: 4.0}


@app.callback()
def main() -> None:
    """Quantized attention for every model under torch.compile."""


@app.command()
def demo(
    model: Annotated[
        list[ModelName] | None, typer.Option(help="Only this model; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, shorter timing.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo-report"),
) -> None:
    """Compile pretrained models with and without torch_sage; compare quality and speed.

    Exits with status 1 if a model is not installed or a goal on quality is missed.
    """
    console = Console()
    _keep_transformers_quiet()
    names = [name.value for name in model or ModelName]
    try:
        for name in names:
            for package in models.PACKAGES[name]:
                package.path()  # all of them, before minutes are spent on the first
        results = []
        for result in _results(names, quick, console):
            console.print(_table(result))
            results.append(result)
    except MissingPackageError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"Report: {report.write(results, output)}", soft_wrap=True)
    missed = [f"{r.title}: {g.name}" for r in results for g in r.goals if not g.met]
    if missed:
        console.print(f"[red]missed: {escape('; '.join(missed))}[/]")
        raise typer.Exit(1)


def _results(names: list[str], quick: bool, console: Console) -> Iterator[ModelResult]:
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {n: progress.add_task("", title=n, total=None, start=False) for n in names}
        for name in names:
            task = tasks[name]
            progress.start_task(task)
            progress.update(task, description="loading")
            loaded = models.load(name, quick)
            steps = sum(w.timed for w in loaded.workloads) + STEPS_BESIDE_TIMING
            progress.update(task, title=loaded.title, total=steps, completed=0)

            def step(description: str, task: TaskID = task) -> None:
                progress.update(task, advance=1, description=description)

            yield measure(loaded, _SECONDS_PER_WORKLOAD[quick], step)
            progress.update(task, completed=steps, description="done")


def _table(result: ModelResult) -> Table:
    table = Table(title=result.title, title_justify="left", show_lines=False)
    for column in ("goal", "result", "target", ""):
        table.add_column(column, overflow="fold")
    for goal in result.all_goals:
        verdict = "[green]met[/]" if goal.met else "[red]missed[/]"
        table.add_row(escape(goal.name), escape(goal.value), escape(goal.target), verdict)
    for timing in result.timings:
        before, after = (f"{1e3 * seconds:.0f} ms" for seconds in timing.medians)
        table.add_row(f"time, {timing.workload}", f"{after}, compiled SDPA {before}", "", "")
    return table


def _keep_transformers_quiet() -> None:
    # The models come from installed packages; a look at a model hub could only time out.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # the GGUF loader's bar heeds nothing else
    transformers().utils.logging.disable_progress_bar()
    transformers().utils.logging.set_verbosity(logging.ERROR)
