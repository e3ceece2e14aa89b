"""A trained backbone, without its projection head, in the layout of torchvision, timm or detectron2.

    python examples/after/export_backbone.py runs/RUN --format torchvision --out resnet50.pth --verify
    python examples/after/export_backbone.py runs/RUN --format timm --out resnet50_timm.pth --verify
    python examples/after/export_backbone.py runs/RUN --format detectron2 --out resnet50.pkl --verify

There is no classifier in the file: load it with strict=False, or into a model without one (timm: num_classes=0).
--verify loads the file into the real torchvision and timm models, and into the backbone of torchvision's Faster R-CNN,
and compares features bit for bit. Of detectron2's layout it compares names and tensors.
"""

import copy
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # pretrain and the training scripts are one folder up

import torch
import tyro
from pretrain.checkpoint import CheckpointError, restore_encoder
from pretrain.encoders import Encoder
from pretrain.run import fail, print_any_name, written_whole
from torch import Tensor, nn

Format = Literal["torchvision", "timm", "detectron2"]
State = dict[str, Tensor]

# torchvision's names, and detectron2's; a later line sees what the earlier ones made
RENAMED = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
RENAMED_BACK = (
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}."),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)
DETECTRON2_NAME = re.compile(  # of detectron2.modeling.backbone.resnet
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))"
    r"\.(weight|norm\.(weight|bias|running_mean|running_var|num_batches_tracked))"
)


@dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[Path]  # checkpoint.pt of a training script, or its run directory
    out: Path  # file to write; of detectron2's, .pkl (as MoCo's converter writes) or .pth
    format: Format = "torchvision"
    small_stem: bool = False  # export a 3 x 3 stem without max-pool; the model that loads it must have one, too
    verify: bool = False  # load the file into the real models, and compare


def main(args: Args) -> None:
    print_any_name()
    try:
        encoder, saved = restore_encoder(args.checkpoint)
    except CheckpointError as error:
        fail(error)
    spec = saved["encoder_spec"]
    check(args, spec)
    state = backbone_state(encoder)
    content: dict[str, Any] = detectron2_file(state) if args.format == "detectron2" else dict(state)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(args.out) as file:
            if args.format == "detectron2" and args.out.suffix == ".pkl":
                pickle.dump({**content, "model": {name: t.numpy() for name, t in content["model"].items()}}, file)
            else:
                torch.save(content, file)
    except OSError as error:
        fail(f"out: {args.out} cannot be written ({error.strerror}). Give another --out.")
    except RuntimeError as error:  # torch.save reports a full disk so
        fail(f"out: {args.out} cannot be written ({(str(error).splitlines() or [''])[0]}).")
    print(f"{args.out}: {spec['arch']} for {args.format}, {len(state)} tensors. {how_to_load(args, spec['arch'])}")
    if args.verify:
        for line in verify(args, spec["arch"], encoder):
            print(f"verified: {line}")


def check(args: Args, spec: dict[str, Any]) -> None:
    arch, small_stem = spec["arch"], spec["image_size"] < 64
    if arch == "small":
        fail("checkpoint: its network is 'small', which none of these libraries has. Train a ResNet to export it.")
    if spec.get("norm") == "group":
        fail("checkpoint: its network has GroupNorm, and these layouts are for batch norm. Use restore_encoder.")
    if spec["channels"] != 3:
        fail(f"checkpoint: its network takes {spec['channels']} channels, and these layouts 3. Use restore_encoder.")
    if "x" in arch and args.format != "detectron2":
        fail(f"format: {args.format} has no {arch} (every convolution wider). Use restore_encoder, or detectron2.")
    if small_stem and args.format == "detectron2":
        fail("format: detectron2's ResNet has a 7 x 7 stem, this network, for small images, 3 x 3. Use torchvision.")
    if small_stem and not args.small_stem:
        fail(
            f"checkpoint: its network has a 3 x 3 stem without max-pool, for images of {spec['image_size']} px, which "
            f"{args.format}'s {arch} does not. Give --small-stem to export it, and change the stem where you load it."
        )


# ---------------------------------------------------------------------------------------------- layouts


def backbone_state(encoder: Encoder) -> State:
    """torchvision's names, which are timm's, too."""
    return {name: tensor.detach().contiguous() for name, tensor in encoder.backbone.state_dict().items()}


def detectron2_file(state: State) -> dict[str, Any]:
    """What detectron2's checkpointer reads, as MoCo's converter makes it; the heuristics match names by their ends."""
    return {
        "model": {renamed(name, RENAMED): tensor for name, tensor in state.items()},
        "__author__": "eqco_loss",
        "matching_heuristics": True,
    }


def renamed(name: str, rules: tuple[Any, ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def how_to_load(args: Args, arch: str) -> str:
    if args.small_stem and args.format != "detectron2":
        return "Before you load it, set conv1 to Conv2d(3, 64, 3, padding=1, bias=False), and maxpool to Identity()."
    if args.format == "torchvision":
        return f"torchvision.models.{arch}().load_state_dict(torch.load(...), strict=False)"
    if args.format == "timm":
        return f"timm.create_model({arch!r}, num_classes=0).load_state_dict(torch.load(...))"
    depth, _, factor = arch.removeprefix("resnet").partition("x")
    width = int(factor or 1)
    resnets = {"DEPTH": int(depth), "STRIDE_IN_1X1": False, "NORM": "SyncBN"}
    if depth in ("18", "34"):
        resnets["RES2_OUT_CHANNELS"] = 64
    if width > 1:
        resnets |= {
            "WIDTH_PER_GROUP": 64 * width,
            "STEM_OUT_CHANNELS": 64 * width,
            "RES2_OUT_CHANNELS": 256 * width,
        }
    settings = ", ".join(f"{name} {value}" for name, value in resnets.items())
    return (
        f"Set MODEL.WEIGHTS to it, MODEL.RESNETS to {settings}, INPUT.FORMAT RGB, "
        "PIXEL_MEAN [123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375]."
    )


# ---------------------------------------------------------------------------------------------- verification


@torch.no_grad()
def verify(args: Args, arch: str, encoder: Encoder) -> list[str]:
    """What was compared with success; anything that differs ends the program."""
    state = verified_state(args, backbone_state(encoder))
    lines = [f"all {len(state)} tensors of the file are the checkpoint's"]
    if args.format == "detectron2":
        return lines
    side = 32 if args.small_stem else 64
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    # The same kernels as in those models, or the last bits differ
    backbone = copy.deepcopy(encoder.backbone).to(memory_format=torch.contiguous_format)
    model = real_model(args.format, arch)
    load(model, state, args.small_stem)
    if not torch.equal(model(images), backbone(images)):
        fail(f"{args.out}: the features of {args.format}'s {arch} differ from those of the checkpoint.")
    lines.append(f"the features of {args.format}'s {arch} are bit-identical")
    if args.format == "torchvision":
        body = faster_rcnn_body(arch)
        load(body, state, args.small_stem)
        for (name, level), ours in zip(body(images).items(), stages(backbone, images), strict=True):
            if not torch.equal(level, ours):
                fail(f"{args.out}: level {name} of Faster R-CNN's backbone differs from the checkpoint's.")
        lines.append(f"the four feature maps of torchvision's Faster R-CNN ({arch}, FPN) are bit-identical")
    return lines


def real_model(format: Format, arch: str) -> nn.Module:
    """With pooled features as its output."""
    model: nn.Module
    if format == "timm":
        import timm

        model = timm.create_model(arch, num_classes=0)
    else:
        import torchvision  # type: ignore[import-untyped]

        model = torchvision.models.get_model(arch, weights=None)
        model.fc = nn.Identity()
    return model


def faster_rcnn_body(arch: str) -> nn.Module:
    """What feeds the FPN."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn  # type: ignore[import-untyped]
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # type: ignore[import-untyped]

    if arch == "resnet50":
        body: nn.Module = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone.body
    else:
        body = resnet_fpn_backbone(backbone_name=arch, weights=None, norm_layer=nn.BatchNorm2d).body
    return body


def load(model: nn.Module, state: State, small_stem: bool) -> None:
    if small_stem:
        channels = state["conv1.weight"].shape[0]
        model.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model.load_state_dict(state)
    model.eval()


def stages(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs of the four stages."""
    maps = []
    for name, layer in backbone.named_children():
        if name == "avgpool":
            break
        images = layer(images)
        if name.startswith("layer"):
            maps.append(images)
    return maps


def verified_state(args: Args, state: State) -> State:
    """The file's tensors, under torchvision's names."""
    path, name = args.out, re.compile(r".*")
    if args.format == "detectron2":
        name = DETECTRON2_NAME
        content = pickle.loads(path.read_bytes()) if path.suffix == ".pkl" else torch.load(path, weights_only=True)
        written = {key: torch.as_tensor(value) for key, value in content["model"].items()}
        found = {renamed(key, RENAMED_BACK): value for key, value in written.items()}
    else:
        found = written = torch.load(path, weights_only=True)
    wrong = [key for key in written if not name.fullmatch(key)]
    wrong += sorted(found.keys() ^ state.keys())
    wrong += [key for key in found.keys() & state.keys() if not torch.equal(found[key], state[key])]
    if wrong:
        fail(f"{path}: it is not what was exported ({', '.join(wrong[:3])}).")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
