"""Commands about configs: show, plan."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_vision.cli.common import AsJson, Overrides, app, plugins_allowed, print_json
from moe_vision.cli.data import data_config, on_file
from moe_vision.files import check_not_input
from moe_vision.terminal import say, terminal

if TYPE_CHECKING:
    from moe_vision.training.schedule import TrainConfig


@app.command()
def show(
    context: typer.Context,
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

    console = terminal()
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
    allowed = plugins_allowed(context)
    if (kind := schedule_class(config)) is not None:
        from moe_vision.training.loading import load_schedule

        schedule = load_schedule(kind, config, overrides or [], allow_plugins=allowed)
        if data is not None:
            schedule = on_file(schedule, data_config(data, image_root))
        show_schedule(schedule, config.stem, image_size, as_json=as_json)
        return
    if data is not None:
        raise ValueError(
            f"show --data is what a train config would be given, and '{config}' has no stages: leave it out"
        )
    from moe_vision.config import load_config
    from moe_vision.modeling.cost import SLICED_SIZE, cost
    from moe_vision.modeling.model_config import ModelConfig
    from moe_vision.viz.plans import parse_size

    model_config = load_config(ModelConfig, config, overrides or [], allow_plugins=allowed)
    costs = cost(model_config, SLICED_SIZE if image_size is None else parse_size(image_size))
    if as_json:
        print_json({"config": model_config.to_plain(), "cost": costs.to_dict()})
    else:
        console.print(cost_table(costs))
        say(console, summary(costs))


def show_schedule(config: "TrainConfig", title: str, image_size: str | None, *, as_json: bool) -> None:
    """Print every run of a train config, of a comparison those of each mixer."""
    from moe_vision.comparison import CompareConfig, schedules
    from moe_vision.modeling.cost import SLICED_SIZE
    from moe_vision.search import SearchConfig, planned_search
    from moe_vision.training.loading import model_config
    from moe_vision.training.plan import plan_schedule
    from moe_vision.viz.plans import parse_size
    from moe_vision.viz.tables import runs_table

    console = terminal()
    size = SLICED_SIZE if image_size is None else parse_size(image_size)
    compared = schedules(config) if isinstance(config, CompareConfig) else {title: config}
    planned = {name: plan_schedule(one, model_config(one), size) for name, one in compared.items()}
    if as_json:
        plain = {name: [run.to_dict() for run in runs] for name, runs in planned.items()}
        print_json({"config": config.model_dump(mode="json"), "runs": plain})
        return
    for name, runs in planned.items():
        console.print(runs_table(runs, f"{name}, seed {config.seed}"))
    say(console, "tokens and FLOPs are estimates; ? where the data is not at hand")
    if isinstance(config, SearchConfig):
        say(console, planned_search(config))


@app.command()
def plan(
    context: typer.Context,
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
    images_per_prompt: Annotated[
        int, typer.Option(help="How many images a prompt has, each of these among them.", min=1, max=100_000)
    ] = 1,
    frames: Annotated[
        int | None, typer.Option(help="Plan videos of so many frames instead.", min=1, max=100_000)
    ] = None,
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
        loaded = load_config(ModelConfig, config, overrides, allow_plugins=plugins_allowed(context))
        slicing = loaded.vision_config().policy()
    if image is not None:
        check_not_input(image, images, "the drawing")
    planned = plan_all(images, slicing, images_per_prompt, frames)
    if image is not None:
        from moe_vision.viz.plan_pictures import draw_plans

        draw_plans(planned, image)
    if as_json:
        print_json([item.to_dict() for item in planned])
    else:
        terminal().print(plan_table(planned, slicing.type_name))


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
