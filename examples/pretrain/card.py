"""A model card: what a finished run is, how it was made, and what its encoder is worth, in one page of Markdown."""

from typing import Any

from .run import Run

MEASURES = {
    "knn_untrained": "weighted kNN of the untrained backbone, %",
    "knn": "weighted kNN, %",
    "online_probe": "linear probe beside the encoder, %",
    "linear_probe": "logistic regression on frozen features, %",
}


def model_card(run: Run) -> str:
    """Of a run whose ``result`` is known."""
    arguments, spec = {**run.fixed, **run.free}, run.contents["encoder_spec"]
    last, result, config = run.rows[-1], run.result or {}, run.config
    seconds = sum(float(row.get("seconds") or 0) for row in run.rows)
    measures = [(title, f"{result[name]:.1f}") for name, title in MEASURES.items() if name in result]
    measures.append(("loss of the last epoch", f"{last['loss']:.3f}"))
    measures.append(("feature std (0: collapsed)", f"{last['feature_std']:.2f}"))
    data = {
        "data set": arguments["dataset"],
        "images": arguments["data"],
        "from": arguments["data_dir"],
        "image size": f"{arguments['image_size']} px, {spec['channels']} channel(s)",
        "augmentation": "placed at random" if arguments["dataset"] == "digits" else arguments["recipe"],
    }
    device = f"{config['device']} ({config['device_name']})"
    made = {
        "device": f"{device}, {config['ranks']} process(es), {arguments['precision']}",
        "loss by": ": ".join(config["loss_backend"]),
        "commit": config["commit"],
        "time": f"{seconds:.0f} s of training, without evaluation",
        **config["versions"],
    }
    epochs = f"{arguments['epochs']} epoch{'s' if arguments['epochs'] > 1 else ''}"
    what = f"A {spec['arch']} encoder, trained by {arguments['method']} for {epochs} without labels"
    before = arguments["resume_from"]
    return "\n".join(
        [
            f"# {run.directory.name}",
            "",
            f"{what}, the first of them by the run of {before}." if before else f"{what}.",
            "",
            *table("measured on the test images", dict(measures)),
            "![curves over the epochs](curves.png)",
            "",
            "## How it was made",
            "",
            "```bash",
            config["command"],
            "```",
            "",
            "All arguments are in config.json, and every epoch is in metrics.csv.",
            "",
            *table("data", data),
            *table("made with", made),
            "## How to use it",
            "",
            "```bash",
            f"python examples/after/linear_eval.py {run.directory}        # the papers' linear probe",
            f"python examples/after/extract_features.py {run.directory} IMAGES    # features of a folder of images",
            *(f"python examples/after/export_backbone.py {run.directory} {flags}" for flags in exported(spec)),
            "```",
            "",
        ]
    )


def exported(spec: dict[str, Any]) -> list[str]:
    """What the export of this network is given; nothing where no library has such a one."""
    if spec["arch"] == "small" or "x" in spec["arch"] or spec.get("norm") == "group" or spec["channels"] != 3:
        return []
    return [f"{'--small-stem ' if spec['image_size'] < 64 else ''}--out backbone.pth"]


def table(title: str, values: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in values.items() if value not in (None, "")]
    return [f"| {title} | |", "| --- | --- |", *rows, ""]
