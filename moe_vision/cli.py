"""The command line: `moe-vision COMMAND --help` teaches each step.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

import atexit
import gc
import json
import multiprocessing
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from moe_vision.training.schedule import DataConfig, TrainConfig

ScheduleT = TypeVar("ScheduleT", bound="TrainConfig")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Mixtures of vision experts in multimodal language models.\n\n"
    "Start with [bold]moe-vision quickstart[/bold], then [bold]show[/bold] a config, [bold]train[/bold] it, "
    "[bold]eval[/bold]uate it, [bold]generate[/bold] answers, [bold]export[/bold] it.",
)
micro_app = typer.Typer(
    no_args_is_help=True, help="The miniature experts and language model that ship with the package."
)
app.add_typer(micro_app, name="micro")
import_app = typer.Typer(no_args_is_help=True, help="Bring in checkpoints that other projects published.")
app.add_typer(import_app, name="import")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE ...", help="Overrides, as [bold]experts.clip.layer=-2[/bold]; "
                   "[bold]experts.sam=null[/bold] takes an expert out; of the model that a config of "
                   "training, comparison or search names, [bold]model.experts.sam=null[/bold]."),
]  # fmt: skip
ImportOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write; by default SOURCE's name and -moe-vision, here.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Import this file first: it registers what a model folder was made with.")
    ] = None,
) -> None:
    if version:
        from moe_vision import __version__

        print(__version__)
        raise typer.Exit
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for path in plugin or []:
        from moe_vision.config import import_plugin

        import_plugin(path.resolve())


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of pictures and training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Run the whole path on the embedded miniature: pictures, training, evaluation, questions, export, report."""
    from moe_vision.quickstart import quickstart as run

    run(output, seed=seed, overwrite=overwrite, console=Console())


@app.command()
def show(
    config: Annotated[Path | None, typer.Argument(help="A model config or a train config, in YAML.")] = None,
    overrides: Overrides = None,
    experts: Annotated[bool, typer.Option("--experts", help="List every checkpoint of the zoo instead.")] = False,
    image_size: Annotated[
        str | None, typer.Option("--size", help="HEIGHTxWIDTH of the image that a sliced model's cost is for.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL that a train config would be given.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths of --data start from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a config builds and costs: experts, grids, tokens, parameters, FLOPs; of a train config, every run."""
    from moe_vision.viz.tables import cost_table, summary

    console = Console()
    if experts:
        from moe_vision.modeling.cost import zoo
        from moe_vision.viz.tables import zoo_table

        if config is not None:
            raise ValueError(f"show --experts takes no config, and got '{config}': leave one of them out")
        if as_json:
            print_json([asdict(entry) for entry in zoo()])
        else:
            console.print(zoo_table(zoo()))
        return
    if config is None:
        raise ValueError("show needs a config, or --experts: for example `moe-vision show configs/model/micro.yaml`")
    if (schedule := schedule_class(config)) is not None:
        show_schedule(schedule, config, overrides or [], image_size, data, image_root, console, as_json=as_json)
        return
    if data is not None:
        raise ValueError(
            f"show --data is what a train config would be given, and '{config}' has no stages: leave it out"
        )
    from moe_vision.config import load_config
    from moe_vision.modeling.cost import SLICED_SIZE, cost
    from moe_vision.modeling.model_config import ModelConfig
    from moe_vision.viz.plans import parse_size

    model_config = load_config(ModelConfig, config, overrides or [])
    costs = cost(model_config, SLICED_SIZE if image_size is None else parse_size(image_size))
    if as_json:
        print_json({"config": model_config.to_plain(), "cost": costs.to_dict()})
    else:
        console.print(cost_table(costs))
        console.print(summary(costs), highlight=False)


def show_schedule(
    kind: "type[TrainConfig]", path: Path, overrides: list[str], image_size: str | None, data: Path | None,
    image_root: Path | None, console: Console, *, as_json: bool,
) -> None:  # fmt: skip
    """Print every run of a train config, of a comparison those of each mixer."""
    from moe_vision.comparison import CompareConfig, schedules
    from moe_vision.modeling.cost import SLICED_SIZE
    from moe_vision.search import SearchConfig, planned_search
    from moe_vision.training.loading import load_schedule, model_config
    from moe_vision.training.plan import plan_schedule
    from moe_vision.viz.plans import parse_size
    from moe_vision.viz.tables import runs_table

    size = SLICED_SIZE if image_size is None else parse_size(image_size)
    config = load_schedule(kind, path, overrides)
    if data is not None:
        config = on_file(config, data_config(data, image_root))
    compared = schedules(config) if isinstance(config, CompareConfig) else {path.stem: config}
    planned = {name: plan_schedule(one, model_config(one), size) for name, one in compared.items()}
    if as_json:
        plain = {name: [run.to_dict() for run in runs] for name, runs in planned.items()}
        print_json({"config": config.model_dump(mode="json"), "runs": plain})
        return
    for name, runs in planned.items():
        console.print(runs_table(runs, f"{name}, seed {config.seed}"))
    console.print("tokens and FLOPs are estimates; ? where the data is not at hand", highlight=False)
    if isinstance(config, SearchConfig):
        console.print(planned_search(config), highlight=False)


@app.command()
def plan(
    images: Annotated[
        list[str], typer.Argument(metavar="SIZE_OR_IMAGE ...", help="Sizes as HEIGHTxWIDTH in pixels, or pictures.")
    ],
    policy: Annotated[
        str | None, typer.Option(help="uhd, tiles, anyres, native, oryx, slime or none, with the published settings.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of it, as [bold]max_slices=9[/bold]; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A model config whose own slicing plans, in place of --policy.")
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(help="How many images a prompt has, each of these among them.")] = 1,
    frames: Annotated[int | None, typer.Option(help="Plan videos of so many frames instead.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Draw views, order and markers to this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a model sees of images of any size, before a pixel is read: views, grid, tokens."""
    from moe_vision.viz.plans import plan_all, plan_table

    if (policy is None) == (config is None):
        raise ValueError("plan needs either --policy or --config: for example `moe-vision plan 672x1008 --policy uhd`")
    if policy is not None:
        from moe_vision.slicing.settings import policy_of

        slicing = policy_of(policy, settings or [])
    else:
        from moe_vision.config import load_config
        from moe_vision.modeling.model_config import ModelConfig

        assert config is not None
        overrides = [f"slicing.{setting}" for setting in settings or []]
        slicing = load_config(ModelConfig, config, overrides).vision_config().policy()
    planned = plan_all(images, slicing, images_per_prompt, frames)
    if image is not None:
        from moe_vision.viz.plan_pictures import draw_plans

        draw_plans(planned, image)
    if as_json:
        print_json([item.to_dict() for item in planned])
    else:
        Console().print(plan_table(planned, slicing.type_name))


def schedule_class(path: Path) -> "type[TrainConfig] | None":
    """What a YAML file with its bases is, if it has stages: a train config, or a comparison's."""
    from moe_vision.config import read_yaml

    values = read_yaml(path)
    if "stages" not in values:
        return None
    from moe_vision.search import SearchConfig
    from moe_vision.training.schedule import TrainConfig

    if set(values) & (set(SearchConfig.model_fields) - set(TrainConfig.model_fields) - {"test"}):
        return SearchConfig
    if "mixers" in values or "test" in values:
        from moe_vision.comparison import CompareConfig

        return CompareConfig
    return TrainConfig


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A train config, in YAML.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; the same call resumes it.")] = Path(
        "run"
    ),
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL, in place of every stage's data.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths of --data start from.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder that keeps what frozen experts make of pictures, for other runs too.")
    ] = None,
    features_gb: Annotated[float, typer.Option(help="Gigabytes of --features at most.", min=0.0)] = 20.0,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A run that aligns an expert, as [bold]01-prealign-sam[/bold]; repeatable. Do no others."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a schedule, stage by stage. Run it again after a crash and it goes on where it stood."""
    from moe_vision.training.distributed import finish, main_console
    from moe_vision.training.loading import load_train_config
    from moe_vision.training.runner import train as run

    train_config = load_train_config(config, overrides or [])
    if data is not None:
        train_config = on_file(train_config, data_config(data, image_root))
    cache = None
    if features is not None:
        from moe_vision.training.feature_store import FeatureStore

        cache = FeatureStore(features, features_gb)
    folder = run(train_config, output, overwrite=overwrite, console=Console(), cache=cache, only=only or [])
    said = f"model: {folder}" if folder != output else f"output: {folder}"
    main_console(Console()).print(said, highlight=False, markup=False, soft_wrap=True)
    finish()


def data_config(path: Path, image_root: Path | None) -> "DataConfig":
    from moe_vision.training.schedule import DataConfig

    return DataConfig(path=str(path.resolve()), image_root=None if image_root is None else str(image_root.resolve()))


def on_file(config: "ScheduleT", data: "DataConfig") -> "ScheduleT":
    """The same schedule with this data in every stage."""
    stages = [stage.model_copy(update={"data": data}) for stage in config.stages]
    return config.model_copy(update={"stages": stages})


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="A train config with `mixers` and `test`, in YAML.")],
    overrides: Overrides = None,
    mixer: Annotated[
        str | None, typer.Option(help="Names, as channel_concat,deformable; all of the config's if left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many, from the config's seed on.", min=1)] = 3,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the comparison; the same call resumes it.")
    ] = Path("comparison"),
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL, in place of every stage's data.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="LLaVA-format JSON or JSONL that is asked afterwards.")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that image paths of --data and --test start from.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train each mixer for the same budget, and print accuracy, tokens, parameters, FLOPs and speed in one table."""
    from moe_vision.comparison import CompareConfig
    from moe_vision.comparison import compare as run
    from moe_vision.training.loading import load_schedule
    from moe_vision.viz.tables import comparison_table

    compared = load_schedule(CompareConfig, config, overrides or [])
    if data is not None:
        compared = on_file(compared, data_config(data, image_root))
    if test is not None:
        compared = compared.model_copy(update={"test": data_config(test, image_root)})
    names = [*compared.mixers] if mixer is None else [name.strip() for name in mixer.split(",")]
    summary = run(compared, names, seeds, output, overwrite=overwrite, console=Console(stderr=as_json))
    if as_json:
        print_json(summary)
    else:
        Console().print(comparison_table(summary))
        print(f"report: {output / 'report.md'}")


@app.command()
def search(
    config: Annotated[Path, typer.Argument(help="A search config, in YAML.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the search; the same call resumes it.")] = (
        Path("search")
    ),
    data: Annotated[
        Path | None, typer.Option(help="LLaVA-format JSON or JSONL, in place of every stage's data.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="LLaVA-format JSON or JSONL that sets are chosen by.")] = None,
    test: Annotated[Path | None, typer.Option(help="LLaVA-format JSON or JSONL that the chosen set is asked.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths of these files start from.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what has failed before.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find the experts that help most, one round at a time, with a report that says what can be told from chance."""
    from moe_vision.search import SearchConfig
    from moe_vision.search import search as run
    from moe_vision.training.loading import load_schedule

    searched = load_schedule(SearchConfig, config, overrides or [])
    if data is not None:
        searched = on_file(searched, data_config(data, image_root))
    asked = {name: path for name, path in (("validation", validation), ("test", test)) if path is not None}
    searched = searched.model_copy(update={name: data_config(path, image_root) for name, path in asked.items()})
    summary = run(searched, output, overwrite=overwrite, retry_failed=retry_failed, console=Console(stderr=as_json))
    if as_json:
        print_json(summary)
    else:
        best = summary["best"]
        print(f"best: {' + '.join(best['experts'])}, {best['test']['value']['mean']:.3f} of the test split")
        print(f"report: {output / 'report.md'}; train it: moe-vision train {output / 'best.yaml'} --output run")


@app.command("eval")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="A run's output, its model/ folder, or an export.")],
    data: Annotated[Path, typer.Argument(help="LLaVA-format JSON or JSONL; `task` groups the scores.")],
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths start from.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 16,
    predictions: Annotated[Path | None, typer.Option(help="Write every answer to this JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer every question of a file and print the share of exact matches, per task."""
    from moe_vision.data.records import load_records
    from moe_vision.evaluation import evaluate, load_on_accelerator
    from moe_vision.viz.tables import accuracy_table

    records = load_records(data, image_root)
    report = evaluate(*load_on_accelerator(model), records, batch_size, max_new_tokens)
    if predictions is not None:
        predictions.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
    if as_json:
        print_json({"average": report.average, "by_task": report.by_task, "count": report.count})
    else:
        Console().print(accuracy_table({model.name: report.by_task}))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A run's output, its model/ folder, or an export.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture; give it again for more.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
    as_json: AsJson = False,
) -> None:
    """Ask one question about pictures on disk."""
    from moe_vision.data.records import load_image
    from moe_vision.evaluation import answer, load_on_accelerator

    images = image or []
    for path in images:
        load_image(path)
    text = answer(*load_on_accelerator(model), question, images, max_new_tokens)
    if as_json:
        print_json({"question": question, "images": [str(path) for path in images], "answer": text})
    else:
        print(text)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's output or its model/ folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the saved one by default.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    metrics: Annotated[
        Path | None, typer.Option(help="JSON of results for the card, as `eval --json` prints it.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="NAME/MODEL", help="Upload the folder to this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private, if it is new.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face folder that loads without this package, and prove it in a second process."""
    from moe_vision.export import export as run

    results = None if metrics is None else read_metrics(metrics)
    report = run(
        source, output, dtype=dtype, max_shard_size=max_shard_size, metrics=results, push=push, private=private,
        overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        print(report.summary())


def read_metrics(path: Path) -> dict[str, Any]:
    """Results for a card. Raises ValueError where the file holds none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"metrics '{path}' is not JSON ({error}): give what `eval --json` printed") from None
    if not isinstance(results, dict):
        raise ValueError(f"metrics '{path}' holds a JSON {type(results).__name__}: give an object of names and values")
    return results


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An export, or a run's output or its model/ folder.")],
    as_json: AsJson = False,
) -> None:
    """Prove that a folder is whole and loads without this package, as `export` does."""
    from moe_vision.export import verify as run

    result = run(folder)
    if as_json:
        print_json(result)
    else:
        print(f"'{folder}' loads without moe_vision; logits within {result['max_difference']:.3g} of its own here, "
              f"{result['new_tokens']} tokens generated")  # fmt: skip


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="model, train, compare or search")] = "model",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of printing.")] = None,
) -> None:
    """Print the JSON Schema that editors complete and check config files with."""
    from moe_vision.comparison import CompareConfig
    from moe_vision.config import Config
    from moe_vision.modeling.model_config import ModelConfig
    from moe_vision.registry import suggest
    from moe_vision.search import SearchConfig
    from moe_vision.training.schedule import TrainConfig

    kinds: dict[str, type[Config]] = {"model": ModelConfig, "train": TrainConfig, "compare": CompareConfig,
                                     "search": SearchConfig}  # fmt: skip
    if kind not in kinds:
        raise ValueError(f"schema of '{kind}': {suggest(kind, list(kinds))}")
    text = json.dumps(kinds[kind].model_json_schema(), indent=2)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


def imported_name(source: Path) -> Path:
    """Where an import goes that was not told where."""
    return Path(f"{source.resolve().name}-moe-vision")


@import_app.command("eagle")
def import_eagle(
    source: Annotated[Path, typer.Argument(help="Folder of an Eagle-X4 or X5 checkpoint, .safetensors or .bin.")],
    output: ImportOutput = None,
    overrides: Overrides = None,
) -> None:
    """Turn an Eagle checkpoint (NVlabs/Eagle, `eagle_llama`) into a model folder for generate, eval and export."""
    from moe_vision.interop import import_eagle as run

    folder = run(source, output or imported_name(source), overrides or [])
    print(f'imported to {folder}. Now try: moe-vision generate {folder} "what is this" --image PICTURE')


@import_app.command("llava-uhd")
def import_llava_uhd(
    source: Annotated[Path, typer.Argument(help="Folder of a LLaVA-UHD v1 checkpoint, .safetensors or .bin.")],
    output: ImportOutput = None,
    overrides: Overrides = None,
) -> None:
    """Turn a LLaVA-UHD v1 checkpoint (thunlp/LLaVA-UHD) into a model folder for generate, eval and export."""
    from moe_vision.interop import import_llava_uhd as run

    folder = run(source, output or imported_name(source), overrides or [])
    print(f'imported to {folder}. Now try: moe-vision generate {folder} "what is this" --image PICTURE')


@import_app.command("slime")
def import_slime(
    source: Annotated[Path, typer.Argument(help="Folder of a SliME checkpoint, .safetensors or .bin.")],
    output: ImportOutput = None,
    overrides: Overrides = None,
) -> None:
    """Turn a SliME checkpoint (yfzhang114/SliME) into a model folder for generate, eval and export."""
    from moe_vision.interop import import_slime as run

    folder = run(source, output or imported_name(source), overrides or [])
    print(f'imported to {folder}. Now try: moe-vision generate {folder} "what is this" --image PICTURE')


@micro_app.command("rebuild")
def rebuild(
    expert: Annotated[list[str] | None, typer.Option(help="Only this part; give it again for more.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; the package's own by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every recipe.")] = 0,
) -> None:
    """Train the miniature experts and language model from nothing, as they were made for this package."""
    from moe_vision.recipes.rebuild import rebuild as run

    print_json(run(expert, output, seed=seed))


@micro_app.command("list")
def list_micro(as_json: AsJson = False) -> None:
    """Print what ships: files, parameters, the seed and metrics of their recipes."""
    from moe_vision.experts.weights import packaged
    from moe_vision.viz.tables import micro_table

    manifest = json.loads((packaged("micro") / "manifest.json").read_text(encoding="utf-8"))
    if as_json:
        print_json(manifest)
    else:
        Console().print(micro_table(manifest))


def main() -> None:
    """The console script: one command in a process of its own."""
    # Importing torch and transformers makes objects by the hundred thousand that live to the end; collecting among them
    # at Python's default pace is a quarter of a short command's time.
    gc.set_threshold(100_000)
    try:
        command()
    except SystemExit as end:
        if end.code or threading.active_count() > 1 or multiprocessing.active_children():
            raise
        leave()


def command() -> None:
    """Run the command of `sys.argv`; a fault of the user's input ends with its message and exit code 2, without a
    traceback.

    Raises:
        SystemExit: always, with the command's exit code.
    """
    debug = "--debug" in sys.argv
    try:
        app()
    except SystemExit as end:
        if message := getattr(end, "message", None):  # training that was told to end says where it stands
            Console(stderr=True, soft_wrap=True).print(escape(message), highlight=False)
        raise
    except (ValueError, KeyError, OSError) as error:
        if debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        sys.exit(2)


def leave() -> None:
    """End the process without taking a million objects apart one by one: a second of a short command. Only `main` may
    call it: whatever else the process was about to do is lost."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def escape(text: str) -> str:
    from rich.markup import escape as rich_escape

    return rich_escape(text)


if __name__ == "__main__":
    main()
