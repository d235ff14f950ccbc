"""Invented company names, a disjoint pool for each split.

No name is meant to be that of a real company. The first word of a name belongs to one split only, so that a
company of the test, or one that looks like it, is never seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

Split = Literal["train", "validation", "test"]

STEMS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Aldermoor",
        "Amberly",
        "Ashgrove",
        "Bexhollow",
        "Brackwell",
        "Brightmere",
        "Calderstone",
        "Carrowby",
        "Cindervale",
        "Corvane",
        "Dalewick",
        "Deltora",
        "Dunmarsh",
        "Eastvale",
        "Elmridge",
        "Farrowgate",
        "Fenwold",
        "Glenarden",
        "Graymoor",
        "Halbrook",
        "Harrowfen",
        "Hexworth",
        "Ironvale",
        "Jesmora",
        "Kelbrae",
        "Kestrelby",
        "Lanternhill",
        "Larkmoor",
        "Lindholt",
        "Lunaris",
        "Marrowby",
        "Merrivane",
        "Northgale",
        "Novarre",
        "Oakhollow",
        "Orrinfield",
        "Pemberlow",
        "Pinecrest",
        "Quillmark",
        "Ravenholt",
        "Redfallow",
        "Rookhaven",
        "Sablewood",
        "Selwick",
        "Silverfen",
        "Stonebay",
        "Tallowmere",
        "Tarnwick",
        "Thistledown",
        "Umberton",
        "Valdara",
        "Verrington",
        "Wexcombe",
        "Whitlow",
        "Wildmarsh",
        "Windermoor",
        "Wrenfield",
        "Yarrowby",
        "Zelandra",
        "Zephyrine",
    ),
    "validation": (
        "Arkenfell",
        "Birchlow",
        "Copperhay",
        "Dovermere",
        "Everholm",
        "Foxbarrow",
        "Hollowell",
        "Larchmont",
        "Mistral",
        "Petravale",
    ),
    "test": (
        "Barrowmint",
        "Blythdale",
        "Castermoor",
        "Driftholm",
        "Embercroft",
        "Galloway",
        "Highmarsh",
        "Juniperus",
        "Kingsarrow",
        "Lowenfeld",
        "Mossgate",
        "Norvalis",
        "Ostermann",
        "Plumstead",
        "Quarrington",
        "Rivenhall",
        "Saltmarsh",
        "Teasdale",
        "Ullenwood",
        "Westerby",
    ),
}
"""First words of the names, by split."""

TRADES = (
    "Aerospace",
    "Analytics",
    "Bank",
    "Biotech",
    "Chemicals",
    "Dynamics",
    "Electronics",
    "Energy",
    "Foods",
    "Freight",
    "Gaming",
    "Glass",
    "Health",
    "Instruments",
    "Logistics",
    "Materials",
    "Media",
    "Mining",
    "Motors",
    "Networks",
    "Optics",
    "Pharma",
    "Power",
    "Rail",
    "Robotics",
    "Shipping",
    "Software",
    "Steel",
    "Systems",
    "Textiles",
    "Tools",
    "Water",
)
"""Second words, the same for all splits."""

FORMS = ("", "", "", " Group", " Holdings", " Inc", " plc", " AG", " Corp")
"""Legal forms; about a third of the names have none."""


def draw_company(source: random.Random, split: Split) -> str:
    """Return a name of the split's pool, e.g. `Brackwell Optics plc`."""
    return f"{source.choice(STEMS[split])} {source.choice(TRADES)}{source.choice(FORMS)}"


def possessive(company: str) -> str:
    """Return the name in the possessive: `Hexworth Foods'`, `Hexworth Steel's`."""
    return f"{company}'" if company.endswith("s") else f"{company}'s"
