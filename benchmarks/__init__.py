"""Time, memory and accuracy of the losses, against what a user would pick instead."""

try:
    import tqdm
    import tyro
except ImportError as error:
    raise ImportError(f'{error}; the benchmarks need: pip install -e ".[benchmarks]"') from error

__all__ = ["tqdm", "tyro"]
