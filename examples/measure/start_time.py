"""From a folder of images to the first step's views, augmented on the device: seconds by phase.

    python examples/measure/start_time.py --data-dir DIR  # with DIR/train/<class>/*, DIR/test/<class>/*
    python examples/measure/start_time.py --data-dir DIR --examples OTHER/examples  # as another checkout does it

Each phase is what the training scripts do, in their order. Files that were read once are in the system's cache: start
it twice, and take the second.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--examples", type=Path, default=Path(__file__).parents[1], help="whose pretrain is measured")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--batch-size", type=int, default=512)
    args = parser.parse_args()
    sys.path.insert(0, str(args.examples))
    marks = [time.perf_counter()]
    import torch
    from pretrain.data import Share, open_data
    from pretrain.training import Training  # noqa: F401  # whose imports a script waits for

    marks.append(time.perf_counter())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = open_data("imagefolder", args.data_dir, seed=0, device=device, workers=args.workers, augment="device")
    marks.append(time.perf_counter())
    next(data.batches(0, Share(args.batch_size)))
    marks.append(time.perf_counter())
    imports, files, views = (after - before for before, after in itertools.pairwise(marks))
    print(f"{data.fingerprint}, {args.workers} workers, {device}")
    total = imports + files + views
    print(f"imports {imports:.1f} s, files {files:.1f} s, first views {views:.1f} s; {total:.1f} s in all")


if __name__ == "__main__":
    main()
