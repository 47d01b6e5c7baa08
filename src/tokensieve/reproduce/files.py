"""The files of a benchmark: on the hub with their sizes, in the local cache, or in a folder of the same layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokensieve.errors import DataError, first_line
from tokensieve.evaluate.records import Record, read_records
from tokensieve.reproduce.recipes import Benchmark

ENDINGS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class HubFiles:
    """The files of a benchmark on the hub.

    Attributes:
        sizes: bytes by name; ``None`` where the hub does not say.
        error: the reason why the hub gives none, in a line; "" otherwise.
    """

    sizes: dict[str, int | None]
    error: str = ""

    def __str__(self) -> str:
        """Return their number and size: "3 files, 0.26 GB"."""
        if self.error:
            return f"size unknown: the hub gives no list of these files ({self.error})"
        return f"{len(self.sizes)} files, {sum(size or 0 for size in self.sizes.values()) / 1e9:.2f} GB"


def configs(benchmark: Benchmark) -> list[str | None]:
    """Return the configs that a benchmark needs: its questions', and its images' if they are apart."""
    return [benchmark.config, *([] if benchmark.images is None else [benchmark.images[0]])]


def chosen(names: Iterable[str], config: str | None, split: str) -> list[str]:
    """Return the files of a config and split among all names: ``config/split-00000-of-00001.parquet``.

    Without a config they are in the folder ``data`` or in none.
    """
    folders = ("", "data") if config is None else (config, f"data/{config}")
    form = re.compile(rf"{re.escape(split)}([-_.].*)?({'|'.join(map(re.escape, ENDINGS))})")
    listed = [(name.rpartition("/")[0], name.rpartition("/")[2], name) for name in sorted(names)]
    return [name for folder, base, name in listed if folder in folders and form.fullmatch(base)]


def on_the_hub(benchmark: Benchmark) -> HubFiles:
    """Return the files that the hub lists, after one quick request."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().dataset_info(benchmark.dataset, files_metadata=True, timeout=10).siblings or []
    except Exception as error:  # no network, no such data set, no permission: many types from several libraries
        return HubFiles({}, first_line(error))
    sizes = {entry.rfilename: entry.size for entry in siblings}
    names = [name for config in configs(benchmark) for name in chosen(sizes, config, benchmark.split)]
    return HubFiles({name: sizes[name] for name in names}, "" if names else "no file of this config and split")


def fetch(benchmark: Benchmark, note: Callable[[str], None] = lambda line: None) -> Path:
    """Return a folder with the files of a benchmark, fetched from the hub once.

    Args:
        note: receives a line before anything is fetched.

    Raises:
        DataError: no network, and no copy in the local cache.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    listed = on_the_hub(benchmark)
    try:
        if listed.error:
            return Path(snapshot_download(benchmark.dataset, repo_type="dataset", local_files_only=True))
        note(f"fetching {benchmark.dataset}: {listed}, unless they are in the local cache")
        for name in listed.sizes:
            path = Path(hf_hub_download(benchmark.dataset, name, repo_type="dataset"))
    except Exception as error:
        raise DataError(
            f"no data set {benchmark.dataset}: the hub does not give it ({listed.error or first_line(error)}), and it "
            "is not in the local cache; --data FOLDER takes a copy of it"
        ) from error
    return path.parents[name.count("/")]


def read(benchmark: Benchmark, folder: Path, config: str | None) -> Iterator[Record]:
    """Yield the rows of one config of a benchmark.

    Raises:
        DataError: the folder has no file of this config and split, or a file cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data takes a folder of files as on the hub")
    names = [str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.suffix in ENDINGS]
    files = chosen(names, config, benchmark.split)
    if not files:
        place = f"{config or 'data'}/{benchmark.split}-*.parquet"
        raise DataError(f"{folder}: no file {place}, as in {benchmark.dataset} on the hub (.jsonl works, too)")
    for name in files:
        yield from read_records(folder / name)
