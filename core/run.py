"""`python -m core.run best.yaml`: the whole pipeline, or named stages of it, unmeasured."""

import json
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from core import config
from core.config import InputError, did_you_mean
from core.settings import Settings
from core.variables import start_again_with

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command(help=__doc__)
def main(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SETTINGS.yaml] [STAGE]...",
            help="A settings file (defaults without one), and stages to run (all without any).",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace one setting, e.g. student.lr=1e-3."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs and artefacts.")] = Path("runs"),
    fast_dev_run: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Dry run: N batches of every phase of every stage, not kept."
        ),
    ] = None,
) -> None:
    try:
        path, names = _sort_words(words or [])
        settings = config.load_settings(path, sets or [])
        start_again_with(settings.machine)
        if fast_dev_run is None:
            run(settings, names, out)
        else:
            dry_run(settings, names, out, fast_dev_run)
    except InputError as error:
        errors = Console(stderr=True, highlight=False)
        errors.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("Interrupted. Finished stages are kept; the same command goes on from there.")
        raise typer.Exit(130) from None


def run(settings: Settings, names: list[str], out: Path) -> Path:
    """Run stages in order, reusing what is there; returns the run folder. Nothing starts before all
    input is checked.
    """
    pipeline = _pipeline()
    from core.artefacts import Store, write_json
    from core.observe import Observer

    pipeline.prepare_process(settings)
    planned = pipeline.plan(settings)
    pipeline.choose_device(settings)
    wanted = [stage for stage in pipeline.STAGES if stage in names or not names]
    store = Store(out / "artefacts")
    for stage in pipeline.required(wanted, settings):
        if store.find(stage, planned[stage].address) is None:
            raise InputError(
                f"{', '.join(wanted)}: {stage} comes before and has not run with these settings; "
                "name it too, or name no stage to run all"
            )
    folder = _new_folder(out)
    (folder / "settings.yaml").write_text(config.dump(settings))
    made: dict[str, Any] = {}
    for number, stage in enumerate(wanted, 1):
        label = f"[{number}/{len(wanted)}] {stage}"
        observer = Observer(on_validation=_validations(label))
        started = time.perf_counter()
        with console.status(f"{label} …") as status:
            observer.on_step = _progress(status, label, observer)
            artefact, new = pipeline.run_stage(stage, settings, store, observer, planned=planned)
        wall_s = time.perf_counter() - started
        found = f"{wall_s:.1f} s" if new else "unchanged, reused"
        console.print(
            f"{label}: {found}  {_figures(artefact)}".rstrip(),
            markup=False,
            soft_wrap=True,
        )
        made[stage] = {"artefact": str(artefact), "wall_s": wall_s if new else None}
        if stage == "evaluate_all":
            _show_comparison(artefact, folder)
    write_json(folder / "run.json", {"stages": made})
    console.print(str(folder), markup=False, soft_wrap=True)
    return folder


def dry_run(settings: Settings, names: list[str], out: Path, batches: int) -> None:
    """Run stages, and all before them, with a few batches of each phase; load every checkpoint.

    Nothing is kept, so the next dry run tries all of it again.
    """
    pipeline = _pipeline()
    from core import reload
    from core.artefacts import Store
    from core.observe import Observer

    pipeline.prepare_process(settings)
    planned = pipeline.plan(settings, batches)
    pipeline.choose_device(settings)
    chosen = names or pipeline.STAGES
    before = pipeline.required(chosen, settings)
    wanted = [stage for stage in pipeline.STAGES if stage in chosen or stage in before]
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".dry-run-", dir=out) as scratch:
        store = Store(Path(scratch), out / "artefacts")
        for number, stage in enumerate(wanted, 1):
            label, started = f"[{number}/{len(wanted)}] {stage}", time.perf_counter()
            with console.status(f"{label} …"):
                pipeline.run_stage(stage, settings, store, Observer(), planned=planned)
                is_fit = stage.endswith("_fit")
                if is_fit:
                    reload.check(stage, settings, store, Observer(), planned)
            wall_s = time.perf_counter() - started
            found = ", its checkpoints give the model back" if is_fit else ""
            console.print(f"{label}: {wall_s:.1f} s{found}", markup=False, soft_wrap=True)
    console.print(
        f"dry run: {len(wanted)} stages, {batches} batches of each phase; nothing is kept"
    )


def _pipeline() -> ModuleType:
    """torch and transformers load only once the input is known to be good."""
    # A note on an optional kernel, written while the library is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from core import pipeline

    return pipeline


def _sort_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """Tell the settings file from stage names. Raises InputError for words that are neither."""
    from typing import get_args

    from core.settings import StageName

    known, path, names = get_args(StageName), None, []
    for word in words:
        if word in known:
            names.append(word)
        elif path is None and (word.endswith((".yaml", ".yml")) or Path(word).exists()):
            path = Path(word)
        else:
            raise InputError(
                f"{word}: neither a settings file nor a stage{did_you_mean(word, known)}; "
                f"stages: {', '.join(known)}"
            )
    return path, names


def _new_folder(out: Path) -> Path:
    """A run folder named by the time; a second run in the same second gets a suffix."""
    name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for suffix in ["", *(f"-{n}" for n in range(2, 100))]:
        folder = out / (name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise InputError(f"{out}: 99 runs begun in one second")


def _progress(status, label: str, observer):
    """Show steps done, rate and the newest phase, at most twice a second."""
    shown = [time.monotonic(), 0]

    def on_step(step) -> None:
        shown[1] += step.samples
        now = time.monotonic()
        if now - shown[0] > 0.5:
            rate = shown[1] / (now - shown[0])
            status.update(
                f"{label}: batch {observer.counts['micro_batches']}, {rate:.0f} samples/s"
            )
            shown[:] = [now, 0]

    return on_step


def _validations(label: str):
    """Print a line for each validation: where training stands and how long it can still take."""
    begun = time.monotonic()

    def on_validation(figures: dict, max_epochs: int) -> None:
        done = figures["epoch"] + 1
        left_min = (time.monotonic() - begun) / done * (max_epochs - done) / 60
        console.print(
            f"{label}: epoch {done}/{max_epochs}  train_loss {figures['train_loss']:.4f}  "
            f"recall@10 {figures['recall@10']:.4f}  ndcg@10 {figures['ndcg@10']:.4f}  "
            f"at most {left_min:.1f} min left",
            markup=False,
            soft_wrap=True,
        )

    return on_validation


def _figures(artefact: Path) -> str:
    """The figures a reader looks for, from a stage's manifest."""
    metrics = json.loads((artefact / "manifest.json").read_text())["metrics"]
    wanted = ("recall@10", "ndcg@10", "loss", "train_loss")
    return "  ".join(f"{k} {metrics[k]:.4f}" for k in wanted if k in metrics)


def _show_comparison(artefact: Path, folder: Path) -> None:
    """The three-way table on the console, and its JSON beside the run."""
    text = (artefact / "all_evaluation_results.json").read_text()
    (folder / "all_evaluation_results.json").write_text(text)
    found = json.loads(text)
    ks = sorted(
        int(k.removeprefix("recall@"))
        for k in found["student"]
        if k.startswith("recall@") and k.removeprefix("recall@").isdigit()
    )
    # Narrow enough for 80 columns, which is also the width of a file or a pipe.
    table = Table(
        title=f"Test, full ranking, {found['student']['users']} users "
        "(recall@k = hit_ratio@k: one target each)",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("model")
    for k in ks:
        table.add_column(f"recall\n@{k}", justify="right")
        table.add_column(f"ndcg\n@{k}", justify="right")
    table.add_column("recall@10 − student\n[95 %]", justify="right")
    for name, row in found.items():
        cells = [f"{row[f'{metric}@{k}']:.4f}" for k in ks for metric in ("recall", "ndcg")]
        difference = row.get("minus_student@10")
        cells.append(_difference(difference) if difference else "")
        table.add_row(name, *cells)
    table.add_row(
        "chance",
        *(c for k in ks for c in (f"{found['student'][f'chance_recall@{k}']:.4f}", "")),
        "",
    )
    console.print(table)


def _difference(found: dict) -> str:
    low, high = found["recall@10_interval"]
    return f"{found['recall@10']:+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    app()
