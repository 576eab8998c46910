"""The paper's ablations in small: the variants, and the table or figure of the paper with the same ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A variant: its title, and its additional ``--set`` options; none for the study's own setting."""

    title: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """An ablation: a method, its variants and tasks; ``source`` is the paper's table or figure."""

    name: str
    title: str
    source: str
    method: str
    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]


def _grid(name: str, values: tuple[str, ...], default: str, symbol: str) -> tuple[Variant, ...]:
    return tuple(Variant(f"{symbol} = {value}", () if value == default else (f"{name}={value}",)) for value in values)


_BOTH = ("glyphs", "text-gru")
ABLATIONS: tuple[Ablation, ...] = (
    Ablation(
        "nkd-parts", "NKD's parts, with the cross-entropy", "Tables 5 and 6", "nkd",
        (
            Variant("target and non-target"),
            Variant("target alone", ("gamma=0",)),
            Variant("non-target alone", ("target_weight=0",)),
        ), _BOTH,
    ),
    Ablation("nkd-gamma", "NKD's weight γ", "Table 10", "nkd",
             _grid("gamma", ("0.5", "1", "1.5", "2", "4"), "1.5", "γ"), _BOTH),
    Ablation("nkd-temperature", "NKD's temperature T", "Table 10", "nkd",
             _grid("temperature", ("0.5", "1", "2", "4"), "1", "T"), _BOTH),
    Ablation(
        "uskd-parts", "USKD's parts", "Tables 14 and 15", "uskd",
        (
            Variant("all"),
            Variant("target alone", ("beta=0", "mu=0")),
            Variant("non-target alone", ("alpha=0",)),
        ), _BOTH,
    ),
    Ablation("uskd-square", "USKD's soft target label, squared or not", "Table 12", "uskd",
             (Variant("squared"), Variant("not squared", ("square=false",))), _BOTH),
    Ablation(
        "uskd-rank", "What USKD ranks the classes by", "Table 9", "uskd",
        (
            Variant("both, normalised"),
            Variant("the weak logits", ("rank=weak",)),
            Variant("the final logits", ("rank=final",)),
            Variant("their sum", ("rank=sum",)),
        ), _BOTH,
    ),
    Ablation("uskd-alpha", "USKD's weight α", "Figure 4", "uskd", _grid("alpha", ("0.5", "1", "2"), "1", "α"), _BOTH),
    Ablation("uskd-beta", "USKD's weight β", "Figure 5", "uskd",
             _grid("beta", ("0.05", "0.1", "0.4"), "0.1", "β"), _BOTH),
    Ablation("uskd-mu", "USKD's weight μ", "Figure 6", "uskd", _grid("mu", ("0.0005", "0.005", "0.05"), "0.005", "μ"),
             _BOTH),
)  # fmt: skip
