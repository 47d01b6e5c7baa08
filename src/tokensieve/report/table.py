"""Rows of results as text, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

from tokensieve.evaluate import Results
from tokensieve.evaluate.plan import is_random_baseline
from tokensieve.evaluate.results import FULL, ORACLE
from tokensieve.methods import MethodInfo, list_methods

Row: TypeAlias = Mapping[str, Any]
Kind: TypeAlias = Literal["full", "oracle", "random", "baseline", "method"]


def as_rows(results: Results) -> list[Row]:
    """Return the pinned fields of every row, its :data:`Kind`, ``by_type`` {question type: accuracy} and
    ``chance``, its comparison with random."""
    baselines = baseline_methods()
    return [
        asdict(row)
        | {"kind": _kind(row.method, baselines), "by_type": {score.type: score.accuracy for score in row.types}}
        | {"chance": row.random}
        for row in results.rows
    ]


def baseline_methods() -> dict[str, MethodInfo]:
    """Return {name: info} of the registered baselines without the unhooked model, sorted by name."""
    return {info.name: info for info in list_methods() if info.paper == "baseline" and info.name != FULL}


def plain_name(spec: str) -> str:
    """Return the method of a spec without its arguments."""
    return spec.partition("(")[0].strip()


def _kind(spec: str, baselines: Mapping[str, MethodInfo]) -> Kind:
    name = plain_name(spec)
    if name in baselines:
        return "random" if is_random_baseline(baselines[name]) else "baseline"
    return "full" if name == FULL else "oracle" if name == ORACLE else "method"


def budget(row: Row) -> str:
    """Return the budget as a user writes it: tokens, or a share in percent."""
    keep = row["keep"]
    if keep is None:
        return "all"
    return f"{100 * keep:.4g}%" if isinstance(keep, float) else str(keep)


def label(row: Row) -> str:
    """Return the method and its budget: ``vtc-cls, 25%``."""
    return row["method"] if row["keep"] is None else f"{row['method']}, {budget(row)}"


def _accuracy(row: Row) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['accuracy_low']:.1f}–{100 * row['accuracy_high']:.1f})"


def _difference(row: Row) -> str:
    if row["kind"] == "full":
        return "–"
    value, low, high = (100 * row[f"difference{part}"] for part in ("", "_low", "_high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "–" if row[key] is None else form.format(row[key])


# header, its meaning, cell
COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("method", "method spec", lambda row: str(row["method"])),
    ("keep", "budget: tokens per image, or a share of them", budget),
    ("tokens", "visual tokens per image that stay after the last stage, mean", _number("tokens_after", "{:.4g}")),
    ("accuracy %", "with its 95 % interval", _accuracy),
    (
        "to full",
        "points lost or won against the full model, paired by question, with the 95 % interval",
        _difference,
    ),
    ("FLOPs", "prefill FLOPs relative to the full model, the method's own included", _number("flops_ratio", "{:.0%}")),
    ("prefill ms", "median time to the first token", _number("prefill_ms", "{:.3g}")),
    ("speedup", "full model's prefill ÷ this, measured in pairs", _number("prefill_speedup", "{:.2f}×")),
    ("method ms", "time of the method alone", _number("method_ms", "{:.2g}")),
    ("ms/token", "time of one decoding step", _number("decode_ms_per_token", "{:.3g}")),
    ("peak MB", "peak of activations in prefill", _number("peak_activation_mb", "{:.3g}")),
    ("KV MB", "KV cache after prefill", _number("kv_mb", "{:.3g}")),
)
